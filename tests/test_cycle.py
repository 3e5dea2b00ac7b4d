"""The life of a state: what init, resample and merge keep, share and leave alone."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn

import rosa_func
from bounds import merge_bound
from cases import (
    ANY_SAMPLER,
    BASES,
    BATCHES,
    DTYPES,
    LAYOUTS,
    LINEAR,
    QUANTISED_BASES,
    SEEDS,
    SIXTEEN_BIT_DTYPES,
    WIDE_DTYPES,
    Case,
    Parts,
    adapt_every_weight,
    cases,
    scattered_layer,
)
from models import randn, seeded, stock_model
from references import (
    dense_weights,
    model_snapshot,
    perturbed,
    residual,
    state_bytes,
    storage_pointers,
)
from rosa_func import quantised, samplers
from rosa_func.weight import Weight, read
from rosa_func.weight.layout import entries
from rosa_func.weight.low_rank import low_rank
from rosa_func.weight.rounding import factor_dtype

pytestmark = [
    pytest.mark.usefixtures("toys"),
    pytest.mark.filterwarnings("ignore:.*forms a batch"),  # of toys, which have no other rule
]


def only_weight(state: TensorDict) -> Weight:
    """Return the state's only adapted weight."""
    return read(state).adapted()["weight"]


def merged_weight(state: TensorDict) -> Tensor:
    """Return the only weight, with the master of a quantised one."""
    if only_weight(state).base.coarse:
        return quantised.merge_into_master(state).weights["weight"]
    return rosa_func.merge(state)["weight"]


def unrounded(state: TensorDict) -> Tensor:
    """Return R + c + A B of the only weight in float64, and with it the other terms."""
    w, wide = only_weight(state), state.apply(lambda t: t.double() if t.is_floating_point() else t)
    wide["frozen", "weight"] = residual(w)
    return dense_weights(wide)["weight"]


def of_dtype(dtype: torch.dtype) -> st.SearchStrategy[Case]:
    return cases(dtypes=st.just(dtype))


def can_be_exact(case: Case) -> bool:
    """Return whether a compensation has room for all that was lost.

    An int8 base takes so many bits of a float64 number that another float64 cannot hold them.
    """
    return case.parts.base == "dense" or case.dtype != torch.float64


# R + c and A B cancel to a tenth of either: what the product loses is more than what the sum does.
CANCELLING = Case(LINEAR, Parts("int8"), torch.float32, samplers.random, 2, 4, 1, seed=1)

ANY_LOW_RANK_PARTS = st.sampled_from([Parts(base) for base in BASES])


class TestMergeReconstructs:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @settings(max_examples=60)
    @given(st.data())
    def test_merge_after_an_exact_init_returns_the_weights(self, dtype, data):
        case = data.draw(of_dtype(dtype).filter(can_be_exact))
        module, state = case.module(), case.state(exact=True)
        merged = rosa_func.merge(state) | {"weight": merged_weight(state)}
        assert all(torch.equal(merged[name], p) for name, p in module.named_parameters())
        assert {name: t.dtype for name, t in merged.items()} == {
            name: p.dtype for name, p in module.named_parameters()
        }

    @pytest.mark.parametrize("exact", [None, False, True])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @settings(max_examples=30)
    @given(st.data())
    def test_merge_after_init_is_within_the_rounding_bound(self, dtype, exact, data):
        case = data.draw(of_dtype(dtype))
        state = case.state(exact)
        is_kept = exact or (exact is None and dtype in SIXTEEN_BIT_DTYPES)
        is_kept = is_kept or case.parts.base in QUANTISED_BASES
        assert ("compensation" in state.keys()) == is_kept
        W = case.module().weight.detach()
        off = (merged_weight(state) - W).abs()
        assert (off <= merge_bound(W, only_weight(state))).all()

    @settings(max_examples=60)
    @given(cases(), st.sampled_from([None, False, True]))
    @example(CANCELLING, True)
    def test_a_merge_of_a_trained_state_is_the_fold_of_its_parts(self, case, exact):
        """A B is formed in the factors' dtype, also where the sums are in a wider one.

        So it is off by g = r u / (1 - r u) times |A||B| (Higham, 3.1), and the scale is below 2.
        The merged weight is rounded once, by half a unit, or half a subnormal step.
        """
        state = case.trained(exact)
        w, expected = only_weight(state), unrounded(state)
        A, B = (factor.double().abs() for factor in low_rank(w))
        product = (A @ B).view(w.shape)
        own = factor_dtype(case.dtype)
        wide = own if w.lost is None else torch.promote_types(own, w.lost.dtype)
        info = torch.finfo(case.dtype)
        bound = info.eps * (expected.abs() + info.smallest_normal)
        bound += (case.r + 1) * torch.finfo(own).eps * product
        bound += 20 * torch.finfo(wide).eps * (2 * (w.base.dense().double().abs() + product) + 1)
        assert ((merged_weight(state) - expected).abs() <= bound).all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @settings(max_examples=60)
    @given(st.data(), ANY_SAMPLER)
    def test_an_exact_resample_keeps_the_merged_weight(self, dtype, data, sampler):
        case = data.draw(of_dtype(dtype).filter(can_be_exact))
        state = case.trained(exact=True)
        r = data.draw(st.integers(1, min(case.m, case.n)))
        old = merged_weight(state)
        new = merged_weight(rosa_func.resample(state, case.seed, r=r, sampler=sampler))
        if only_weight(state).lost.dtype == dtype:
            assert torch.equal(new, old)
        else:
            # Both round a sum that is the same up to 2**-53: they differ only near a tie.
            unit = torch.finfo(dtype).eps * old.abs().double() + torch.finfo(dtype).smallest_normal
            assert ((new.double() - old.double()).abs() <= unit).all()

    @pytest.mark.parametrize("dtype", WIDE_DTYPES, ids=str)
    @settings(max_examples=60)
    @given(st.data(), ANY_SAMPLER)
    def test_resample_keeps_the_merged_weight_within_the_rounding_bound(self, dtype, data, sampler):
        state = data.draw(of_dtype(dtype)).trained(exact=False)
        new = rosa_func.resample(state, 1, sampler=sampler)
        W = merged_weight(state)
        assert ((merged_weight(new) - W).abs() <= merge_bound(W, only_weight(new))).all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(257, 513), (768, 300)], ids=str)
    def test_merges_are_exact_in_blocks_and_with_several_threads(self, dtype, shape):
        module = scattered_layer(LINEAR, *shape, dtype, 0)
        for sampler in (samplers.random, samplers.projection):
            state = adapt_every_weight(module, 33, exact=True, sampler=sampler)
            assert torch.equal(rosa_func.merge(state)["weight"], module.weight)
            if torch.finfo(dtype).bits >= 32:
                state = perturbed(state)
                new = rosa_func.resample(state, 1, r=7, sampler=sampler)
                assert torch.equal(rosa_func.merge(new)["weight"], rosa_func.merge(state)["weight"])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_merge_after_an_exact_init_returns_a_stock_models_weights(self, dtype):
        model = stock_model("gpt2-small", dtype).model
        merged = rosa_func.merge(rosa_func.init(model, 3, exact=True))
        assert all(torch.equal(merged[name], p) for name, p in model.named_parameters())


class TestDrift:
    @settings(max_examples=2)  # of a thousand resamples each
    @given(ANY_SAMPLER, st.integers(8, 24), st.integers(8, 24), st.integers(1, 8), SEEDS)
    def test_1000_idle_resamples_in_float32(self, sampler, m, n, r, seed):
        module = nn.Linear(n, m, bias=False)
        module.load_state_dict({"weight": randn(m, n, seed=seed)})
        state = rosa_func.init(module, r, sampler=sampler)
        for step in range(1000):
            state = rosa_func.resample(state, seed + step, sampler=sampler)
        W = module.weight.detach()
        assert (rosa_func.merge(state)["weight"] - W).norm() <= 1e-5 * W.norm()

    @pytest.mark.parametrize("base", BASES)
    @settings(max_examples=4)
    @given(st.data(), st.sampled_from(SIXTEEN_BIT_DTYPES))
    def test_100_idle_resamples_with_a_compensation_in_16_bit(self, base, data, dtype):
        case = data.draw(cases(parts=st.just(Parts(base)), dtypes=st.just(dtype)))
        state, start = case.state(), case.module().weight.detach().double()
        for step in range(100):
            state = rosa_func.resample(state, case.seed + step, sampler=case.sampler)
        # In float16 a master of small values has steps of 6e-8.
        drift = 1e-3 if base in QUANTISED_BASES else 1e-4
        assert (unrounded(state) - start).norm() <= drift * start.norm()

    @settings(max_examples=4)
    @given(cases(parts=st.just(Parts("int8")), dtypes=st.just(torch.float32)))
    def test_100_idle_resamples_of_an_exact_int8_base_return_the_weight(self, case):
        state = case.state(exact=True)
        for step in range(100):
            state = rosa_func.resample(state, case.seed + step, sampler=case.sampler)
        assert torch.equal(merged_weight(state), case.module().weight)

    @pytest.mark.parametrize("dtype", SIXTEEN_BIT_DTYPES, ids=str)
    @pytest.mark.parametrize(
        ("layout", "sampler"),
        [(LINEAR, samplers.random), *((layout, samplers.projection) for layout in LAYOUTS)],
        ids=lambda value: getattr(value, "__name__", str(value)),
    )
    def test_small_changes_of_a_16_bit_weight_are_kept(self, layout, sampler, dtype):
        """Each cycle changes W by 1e-5 relative, along one direction's part in its subspace.

        After all cycles the change is 6e-4. The drift of the test above is 6e-5, in a random
        direction, so 1 / sqrt(m n) of it lies along the change: at 200 x 160 6e-4 of the change.
        """
        m, n = (120, 96) if layout in BATCHES else (200, 160)
        module = seeded(lambda: layout.build(m, n)).to(dtype)
        normal = randn(*module.weight.shape, seed=0)
        module.load_state_dict({"weight": normal}, strict=False)
        W = module.weight.detach().double()
        state, intended = adapt_every_weight(module, n // 4, sampler=sampler), torch.zeros_like(W)
        for step in range(100):
            A, B = (state["trainable", "weight", factor] for factor in "AB")
            direction = randn(*low_rank(only_weight(state)).shape, seed=1)
            dB = torch.linalg.pinv(A) @ direction
            dB *= 1e-5 * W.norm() / (A @ dB).norm()
            intended += (A.double() @ ((B + dB).double() - B.double())).view(W.shape)
            B += dB
            state = rosa_func.resample(state, step, sampler=sampler)
        realised = ((unrounded(state) - W) * intended).sum() / intended.square().sum()
        assert intended.norm() >= 4e-4 * W.norm()
        assert abs(realised.item() - 1) <= 1e-3


class TestOneCycle:
    @settings(max_examples=20)
    @given(cases(parts=ANY_LOW_RANK_PARTS, dtypes=st.just(torch.float64)))
    def test_the_change_of_one_cycle_has_at_most_rank_2r(self, case):
        state = case.state(exact=True)
        change = merged_weight(perturbed(state, seed=case.seed)) - merged_weight(state)
        A, B = low_rank(only_weight(state))
        change = change.view(*A.shape[:-1], B.shape[-1])
        assert (torch.linalg.matrix_rank(change, rtol=1e-9) <= 2 * case.r).all()

    @settings(max_examples=30)
    @given(cases(dtypes=st.sampled_from(WIDE_DTYPES)))
    def test_what_does_not_train_is_bit_identical_while_training(self, case):
        module, state = case.module(), case.state()
        before = {path: tensor.clone() for path, tensor in entries(state).items()}
        optimizer = torch.optim.AdamW(rosa_func.parameters(state), 0.1)
        for step in range(3):
            optimizer.zero_grad()
            rosa_func.call(module, state, case.input(step)).square().sum().backward()
            optimizer.step()
        for path, tensor in entries(state).items():
            assert torch.equal(before[path], tensor) == (path[0] != "trainable"), path


class TestPurity:
    @settings(max_examples=60)
    @given(cases(), ANY_SAMPLER, st.sampled_from([None, False, True]))
    def test_no_function_changes_the_state_or_the_model(self, case, sampler, exact):
        module = case.module()
        model, rng = model_snapshot(module), torch.get_rng_state()
        state = adapt_every_weight(module, case.r, exact=exact, sampler=case.sampler)
        state = case.parts.put_into(state, exact)
        rosa_func.parameters(state)
        before = state_bytes(state)
        new = rosa_func.resample(state, 1, sampler=sampler)
        rosa_func.merge(state), rosa_func.compose(state), rosa_func.count(state)
        rosa_func.call(module, state, case.input())
        assert state_bytes(state) == before
        assert model_snapshot(module) == model
        assert torch.equal(torch.get_rng_state(), rng)
        assert not any(t.requires_grad for t in new.values(True, True))

    @settings(max_examples=30)
    @given(cases(), ANY_SAMPLER)
    def test_a_resampled_state_shares_no_memory_that_is_written_to(self, case, sampler):
        """A support stays what it was; what trains and the residual are new."""
        state = case.trained()
        new = rosa_func.resample(state, 1, sampler=sampler)
        kept = [t for path, t in entries(state).items() if path[0] != "fixed" and t.numel()]
        made = [
            t
            for path, t in entries(new).items()
            if path[0] != "fixed" and path[1] == "weight" and t.numel()
        ]
        assert not storage_pointers(kept) & storage_pointers(made)

    def test_a_state_shares_what_is_neither_adapted_nor_trained_with_the_model(self):
        module = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.BatchNorm1d(5))
        state = rosa_func.init(module, 2, train="1")
        own = {name: t.data_ptr() for name, t in module.state_dict(keep_vars=True).items()}
        new = rosa_func.resample(state, 0)
        for s in (state, new):
            shared = {n for n, t in s["frozen"].items() if t.data_ptr() == own[n]}
            assert shared == set(own) - {"0.weight", "1.weight", "1.bias"}
            trained = [s["trainable", name].data_ptr() for name in ("1.weight", "1.bias")]
            assert not set(trained) & set(own.values())
        apart = [("frozen", "0.weight"), ("trainable", "1.weight"), ("trainable", "0.weight", "A")]
        assert all(state[path].data_ptr() != new[path].data_ptr() for path in apart)

    def test_parameters_are_the_states_own_tensors(self):
        state = rosa_func.init(nn.Linear(6, 5), 2, train="bias")
        assert not any(t.requires_grad for t in state.values(True, True))
        leaves = rosa_func.named_parameters(state)
        assert list(leaves) == ["weight.A", "weight.B", "bias"]
        assert all(leaf.requires_grad for leaf in leaves.values())
        again = rosa_func.parameters(state)
        assert all(a is b for a, b in zip(leaves.values(), again, strict=True))
        assert leaves["weight.A"] is state["trainable", "weight", "A"]


class TestResample:
    def test_resample_draws_other_subspaces_at_other_keys(self):
        state = rosa_func.init(nn.Linear(12, 10), 2)
        a, b = (rosa_func.resample(state, key)["trainable", "weight", "A"] for key in (1, 2))
        assert not torch.allclose(a, b)

    def test_resample_takes_a_new_rank(self):
        state = rosa_func.init(nn.Linear(12, 10), 2)
        new = rosa_func.resample(state, 1, r={"weight": 0.5})
        assert new["trainable", "weight", "A"].shape == (10, 5)

    @pytest.mark.parametrize("states", [1, 2])
    def test_resample_refuses_stacked_states(self, states):
        """A stack of one would else be drawn as a convolution of one channel."""
        state = rosa_func.init(nn.Linear(6, 4), 1, targets="weight")
        with pytest.raises(ValueError, match=f"weight is a stack of {states} states"):
            rosa_func.resample(torch.stack([state] * states), 1)

    def test_additive_keeps_the_input_side_of_each_layout(self):
        for layout in LAYOUTS:
            state = adapt_every_weight(layout.build(5, 7), 2, sampler=samplers.lora)
            new = rosa_func.resample(state, 1, sampler=samplers.additive)["trainable", "weight"]
            input_side, output_side = "AB"[layout.input_dim], "BA"[layout.input_dim]
            assert new[input_side].any() and not new[output_side].any()

    def test_resample_takes_factors_that_require_gradients(self):
        state = rosa_func.init(nn.Linear(12, 10), 2)
        rosa_func.parameters(state)
        assert not rosa_func.resample(state, 1)["trainable", "weight", "A"].requires_grad
