"""The entries of a state: those that are missing or do not fit are named."""

import pytest
import torch

import rosa_func
from models import two_layers
from references import state_bytes


@pytest.mark.parametrize(
    "function",
    ["compose", "call", "resample", "merge", "count", "parameters", "named_parameters"],
)
@pytest.mark.parametrize(
    "path, part",
    [
        (("frozen",), "frozen"),
        (("trainable",), "trainable"),
        (("input_dim",), "input_dim"),
        (("frozen", "0.weight"), "0.weight"),
        (("trainable", "0.weight"), "0.weight"),
        (("trainable", "0.weight", "A"), "factor A of 0.weight"),
        (("trainable", "0.weight", "B"), "factor B of 0.weight"),
        (("input_dim", "0.weight"), "0.weight"),
        (("compensation", "0.weight"), "compensation of 0.weight"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_every_function_names_a_missing_entry_of_a_state(function, path, part):
    model = two_layers()
    state = rosa_func.init(model, 2, exact=True)
    del state[path]
    before = state_bytes(state)
    use = {
        "compose": lambda: rosa_func.compose(state),
        "call": lambda: rosa_func.call(model, state, torch.ones(2, 6)),
        "resample": lambda: rosa_func.resample(state, 1),
        "merge": lambda: rosa_func.merge(state),
        "count": lambda: rosa_func.count(state),
        "parameters": lambda: rosa_func.parameters(state),
        "named_parameters": lambda: rosa_func.named_parameters(state),
    }
    with pytest.raises(KeyError) as caught:
        use[function]()
    assert part in str(caught.value)
    assert state_bytes(state) == before


def test_factors_that_do_not_fit_the_residual_are_refused():
    state = rosa_func.init(two_layers(), 2)
    state["trainable", "0.weight", "A"] = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"0\.weight.*\(4, 3\).*\(2, 6\).*\(4, 6\)"):
        rosa_func.merge(state)


def test_a_compensation_that_does_not_fit_the_residual_is_refused():
    state = rosa_func.init(two_layers(), 2, exact=True)
    state["compensation", "0.weight"] = torch.zeros(4, 1)
    with pytest.raises(ValueError, match=r"compensation of 0\.weight .*\(4, 1\).*\(4, 6\)"):
        rosa_func.merge(state)


def test_a_compensation_of_a_weight_that_is_not_adapted_is_named():
    state = rosa_func.init(two_layers(), 2, targets="0", exact=True)
    state["compensation", "2.weight"] = torch.zeros(8, 4)
    with pytest.raises(KeyError, match=r"compensation of 2\.weight, which is not adapted"):
        rosa_func.resample(state, 1)


@pytest.mark.parametrize("exact", [None, True])
def test_a_missing_compensation_of_a_16_bit_weight_is_named(exact):
    """By default only 16-bit weights have one: a float32 weight beside them needs none."""
    model = two_layers()
    model[0].bfloat16()
    state = rosa_func.init(model, 2, exact=exact)
    assert set(state["compensation"].keys()) == {"0.weight"} | ({"2.weight"} if exact else set())
    rosa_func.merge(state)
    del state["compensation", "0.weight"]
    with pytest.raises(KeyError, match=r"compensation of 0\.weight"):
        rosa_func.merge(state)


def test_a_missing_compensation_of_a_float32_weight_in_an_exact_state_is_named():
    """All weights of an exact state have one; that of a 16-bit weight is in float64."""
    model = two_layers()
    model[0].bfloat16()
    state = rosa_func.init(model, 2, exact=True)
    del state["compensation", "2.weight"]
    with pytest.raises(KeyError, match=r"compensation of 2\.weight"):
        rosa_func.merge(state)


def test_a_state_without_tensors_of_two_dtypes_has_no_entry_for_them():
    state = rosa_func.init(two_layers(), 2, train="2.bias")
    assert state.keys() == {"frozen", "trainable", "input_dim"}
    state = rosa_func.init(two_layers().bfloat16(), 2, exact=False)
    assert state.keys() == {"frozen", "trainable", "input_dim"}


def test_a_model_dtype_of_what_is_not_trained_in_full_is_named():
    state = rosa_func.init(two_layers().bfloat16(), 2, train="2.bias")
    del state["trainable", "2.bias"]
    with pytest.raises(KeyError, match=r"model_dtype of 2\.bias, which is not trained in full"):
        rosa_func.merge(state)


def test_a_state_of_an_earlier_version_trains_16_bit_tensors_as_it_did():
    """It has no float32 masters, and no entry that says so: what trains is the model's tensor."""
    model = two_layers().bfloat16()
    state = rosa_func.init(model, 2, train="2.bias")
    expected = rosa_func.call(model, state, torch.ones(2, 6).bfloat16())
    del state["model_dtype"]
    state["trainable", "2.bias"] = model[2].bias.detach().clone()
    for old in (state, rosa_func.resample(state, 1)):
        assert rosa_func.named_parameters(old)["2.bias"].dtype == torch.bfloat16
        assert torch.equal(rosa_func.merge(old)["2.bias"], model[2].bias)
    assert torch.equal(rosa_func.call(model, state, torch.ones(2, 6).bfloat16()), expected)
