"""Keys are values: what they determine, and what they do not depend on."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rosa_func
from cases import (
    ANY_DTYPE,
    ANY_SAMPLER,
    BATCHES,
    SAMPLER_NAMES,
    SAMPLERS_THAT_DRAW,
    adapt_every_weight,
    cases,
)
from models import seeded
from rosa_func.keys import generator
from rosa_func.samplers import Site
from rosa_func.weight import read
from rosa_func.weight.low_rank import low_rank
from rosa_func.weight.rounding import factor_dtype, join

pytestmark = pytest.mark.usefixtures("toys")

KEYS = st.integers(-(2**70), 2**70)
DATA = st.lists(st.integers() | st.text(max_size=5), max_size=3)

# The arguments are a number of threads and the names of samplers. Prints a digest of all bits of a
# state for each sampler and dtype.
DIGEST = """
import hashlib, sys, torch, rosa_func
from torch import nn
torch.set_num_threads(int(sys.argv[1]))
weights = torch.Generator().manual_seed(0)
model = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 300))
both = nn.Sequential(model, nn.Linear(770, 768))  # so wide a weight `top` takes another way
with torch.no_grad():
    for p in both.parameters():
        p.copy_(torch.randn(p.shape, generator=weights))
for dtype in (torch.float32, torch.bfloat16):
    for name in sys.argv[2:]:
        sampler = getattr(rosa_func.samplers, name)
        given = (both if name == "top" else model).to(dtype)
        state = rosa_func.init(given, 5, exact=True, sampler=sampler)
        state = rosa_func.resample(state, 1, sampler=sampler)
        digest = hashlib.sha256()
        for _, tensor in sorted(state.items(True, True), key=lambda item: str(item[0])):
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        print(dtype, name, digest.hexdigest())
"""


def seeded_linear(inputs: int, outputs: int) -> nn.Linear:
    return seeded(lambda: nn.Linear(inputs, outputs))


class TestFoldIn:
    @given(st.integers(), DATA)
    def test_fold_in_is_a_function_of_its_arguments_and_gives_a_key(self, key, data):
        folded = rosa_func.fold_in(key, *data)
        assert folded == rosa_func.fold_in(key, *data)
        assert 0 <= folded < 2**63

    @given(st.integers(), st.integers(), DATA, DATA)
    def test_fold_in_of_other_arguments_gives_another_key(self, key, other, data, other_data):
        if (key, data) != (other, other_data):
            assert rosa_func.fold_in(key, *data) != rosa_func.fold_in(other, *other_data)

    @given(st.integers(-(2**31), 2**31 - 1), st.sampled_from([np.int32, np.int64]))
    def test_an_integer_of_numpy_is_the_key_that_it_is_equal_to(self, key, kind):
        """`init(model, key=rng.integers(9))` was refused: a key is an int."""
        assert rosa_func.fold_in(kind(key), kind(key)) == rosa_func.fold_in(key, key)

    @pytest.mark.parametrize(
        "key", [True, "0", 0.0, None, torch.tensor(0), np.bool_(True), np.float64(0), np.array(0)]
    )
    def test_fold_in_refuses_a_key_that_is_not_an_int(self, key):
        with pytest.raises(TypeError, match="a key is an int, got"):
            rosa_func.fold_in(key)

    @pytest.mark.parametrize("item", [True, 0.5, None])
    def test_fold_in_refuses_data_other_than_ints_and_strings(self, item):
        with pytest.raises(TypeError, match="ints and strings"):
            rosa_func.fold_in(0, item)


class TestDraws:
    @given(st.integers(0, 2**32 - 1), st.integers(1, 2**40))
    def test_keys_that_differ_beyond_32_bits_draw_differently(self, low, high):
        draws = [
            torch.rand(8, generator=generator(key, "init", "w"))
            for key in (low, low + (high << 32))
        ]
        assert not torch.equal(*draws)

    @pytest.mark.parametrize(
        "wrapped", ["_orig_mod.a.weight", "module.a.weight", "a._orig_mod.weight"]
    )
    def test_wrappers_do_not_change_a_draw(self, wrapped):
        plain = torch.rand(8, generator=generator(0, "init", "a.weight"))
        assert torch.equal(plain, torch.rand(8, generator=generator(0, "init", wrapped)))

    def test_a_wrapped_model_draws_as_the_plain_one(self):
        model = nn.Sequential(seeded_linear(12, 10))
        plain = rosa_func.init(model, 3)["trainable", "0.weight"]
        compiled = torch.compile(model, backend="eager")
        wrapped = rosa_func.init(compiled, 3)["trainable", "_orig_mod.0.weight"]
        assert all(torch.equal(plain[f], wrapped[f]) for f in "AB")

    def test_init_and_resample_differ_at_the_same_key(self):
        model = seeded_linear(12, 10)
        first = rosa_func.init(model, 3, key=0, exact=True)
        second = rosa_func.resample(first, 0)
        assert not torch.allclose(
            first["trainable", "weight", "A"], second["trainable", "weight", "A"]
        )

    @given(ANY_SAMPLER, KEYS, st.integers(1, 10), ANY_DTYPE)
    def test_adding_a_target_leaves_the_others_bit_identical(self, sampler, key, r, dtype):
        model = nn.Sequential(seeded_linear(12, 10), seeded_linear(10, 12)).to(dtype)
        options = {"sampler": sampler, "key": key}
        alone = rosa_func.init(model, r, targets="0", **options)
        both = rosa_func.init(model, r, **options)
        for one, two in ((alone, both), (rosa_func.resample(s, key) for s in (alone, both))):
            for part in (("trainable", "0.weight", "A"), ("trainable", "0.weight", "B")):
                assert torch.equal(one[part], two[part])
            assert torch.equal(one["frozen", "0.weight"], two["frozen", "0.weight"])

    @settings(max_examples=30)
    @given(cases(), KEYS)
    def test_a_draw_is_a_function_of_the_weight_and_the_key(self, case, key):
        """Each matrix of a batch draws from a key of its own, whatever the weight is stored as."""
        first = case.state(exact=True)
        second = rosa_func.resample(first, key, sampler=case.sampler)
        started, drawn_again = (read(state).adapted()["weight"] for state in (first, second))
        draws = [
            ("init", case.seed, case.module().weight.detach(), started),
            ("resample", key, join(started), drawn_again),
        ]
        for purpose, used, W, w in draws:
            W, found = W.to(factor_dtype(case.dtype)), low_rank(w)
            matrices = {(e,): W[e] for e in range(len(W))} if w.is_batch() else {(): W.flatten(1)}
            for place, M in matrices.items():
                generated = generator(used, purpose, "weight", *place)
                site = Site("weight", case.layout.input_dim % 2, generated)
                for factor, drawn in zip(found, case.sampler(M, case.r, site), strict=True):
                    assert torch.equal(factor[place], drawn)

    @given(st.sampled_from(SAMPLERS_THAT_DRAW), KEYS, st.integers(1, 5), st.sampled_from(BATCHES))
    def test_equal_matrices_of_a_batch_draw_differently(self, sampler, key, r, layout):
        module = seeded(lambda: layout.build(12, 10))
        module.load_state_dict({"weight": module.weight[:1].expand(3, -1, -1)})
        state = adapt_every_weight(module, r, sampler=sampler, key=key)
        factors = state["trainable", "weight"]
        assert not all(torch.allclose(factors[f][0], factors[f][1]) for f in "AB")

    @given(st.sampled_from(SAMPLERS_THAT_DRAW), KEYS, st.integers(1, 11))
    def test_equal_weights_in_two_layers_draw_differently(self, sampler, key, r):
        model = nn.Sequential(seeded_linear(24, 24), seeded_linear(24, 24))
        assert torch.equal(model[0].weight, model[1].weight)
        trainable = rosa_func.init(model, r, sampler=sampler, key=key)["trainable"]
        first, second = (trainable[f"{i}.weight"] for i in (0, 1))
        same = [torch.allclose(first[factor], second[factor]) for factor in "AB"]
        assert not all(same)

    def test_another_process_with_other_threads_draws_the_same_bits(self):
        one, two = (
            subprocess.run(
                [sys.executable, "-c", DIGEST, threads, *SAMPLER_NAMES],
                check=True,
                capture_output=True,
                text=True,
            ).stdout.splitlines()
            for threads in ("1", "2")
        )
        assert one == two
        assert len(set(one)) == 2 * len(SAMPLER_NAMES)

    def test_a_draw_restores_the_number_of_threads(self):
        before = torch.get_num_threads()
        rosa_func.resample(rosa_func.init(seeded_linear(4, 3), 1), 0)
        assert torch.get_num_threads() == before
