"""`method` binds the options of `init` and `resample`, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rosa_func
from cases import ANY_SAMPLER
from models import seeded, tiny_gpt2
from references import state_bytes
from rosa_func import samplers


@given(
    r=st.sampled_from([1, 2, 0.3, {"c_attn": 2, "*": 1}]),
    sampler=ANY_SAMPLER,
    exact=st.sampled_from([None, True, False]),
    key=st.integers(),
)
def test_a_method_is_init_and_resample_with_their_options_bound(r, sampler, exact, key):
    model = seeded(tiny_gpt2)
    options = {"sampler": sampler, "targets": ["c_attn", "wte"], "train": "ln_f", "exact": exact}
    init, resample = rosa_func.method(r, **options)
    state = init(model, key=key)
    assert state_bytes(state) == state_bytes(rosa_func.init(model, r, key=key, **options))
    expected = rosa_func.resample(state, key, r=r, sampler=sampler)
    assert state_bytes(resample(state, key)) == state_bytes(expected)
    assert state_bytes(init(model)) == state_bytes(rosa_func.init(model, r, **options))


def test_a_methods_parts_have_names_and_its_options_can_be_overridden():
    model, bound = seeded(tiny_gpt2), rosa_func.method(2, sampler=samplers.top)
    state = bound.resample(bound.init(model), 1, r=3, sampler=samplers.lora)
    assert state["trainable", "transformer.h.0.attn.c_attn.weight", "A"].shape == (12, 3)


def test_a_method_raises_the_errors_of_init():
    with pytest.raises(TypeError, match="int or a fraction"):
        rosa_func.method("2").init(seeded(tiny_gpt2))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'r'"):
        rosa_func.method(sampler=samplers.top)
