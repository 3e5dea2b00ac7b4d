"""The life of a state: what init, resample and merge keep, share and leave alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn

import rosa_func
from bounds import rounding_bound, rounding_bound_in_16_bit
from cases import (
    ANY_16_BIT_DTYPE,
    ANY_LAYOUT,
    ANY_SAMPLER,
    ANY_WIDE_DTYPE,
    DTYPES,
    LAYOUTS,
    LINEAR,
    SAMPLERS,
    SEEDS,
    SIXTEEN_BIT_DTYPES,
    SIZES,
    WIDE_DTYPES,
    adapt_every_weight,
    scattered_layer,
)
from models import randn, stock_model
from references import model_snapshot, perturbed, state_bytes
from rosa_func import samplers


def matrix_and_factors(weight: Tensor, state: TensorDict) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return W as a matrix, and R, A and B of the state's only adapted weight."""
    A, B = (state["trainable", "weight", factor] for factor in "AB")
    return weight.detach().flatten(1), state["frozen", "weight"].flatten(1), A, B


def unrounded(state: TensorDict, name: str) -> Tensor:
    """Return R + c + A B in float64."""
    A, B = (state["trainable", name, factor].double() for factor in "AB")
    return state["frozen", name].double() + state["compensation", name].double() + A @ B


class TestMergeReconstructs:
    @pytest.mark.parametrize("sampler", SAMPLERS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @given(ANY_LAYOUT, SIZES, SIZES, st.data(), SEEDS)
    def test_merge_after_an_exact_init_returns_the_weights(
        self, sampler, dtype, layout, m, n, data, seed
    ):
        module = scattered_layer(layout, m, n, dtype, seed)
        r = data.draw(st.integers(1, min(m, n)))
        state = adapt_every_weight(module, r, exact=True, sampler=sampler, key=seed)
        merged = rosa_func.merge(state)
        assert all(torch.equal(merged[name], p) for name, p in module.named_parameters())
        assert {name: t.dtype for name, t in merged.items()} == {
            name: p.dtype for name, p in module.named_parameters()
        }

    @pytest.mark.parametrize("sampler", SAMPLERS)
    @pytest.mark.parametrize("dtype", WIDE_DTYPES, ids=str)
    @given(ANY_LAYOUT, SIZES, SIZES, st.data(), SEEDS)
    def test_merge_after_init_is_within_the_rounding_bound(
        self, sampler, dtype, layout, m, n, data, seed
    ):
        module = scattered_layer(layout, m, n, dtype, seed)
        r = data.draw(st.integers(1, min(m, n)))
        state = adapt_every_weight(module, r, sampler=sampler, key=seed)
        assert "compensation" not in state.keys()
        W, R, A, B = matrix_and_factors(module.weight, state)
        off = (rosa_func.merge(state)["weight"].flatten(1) - W).abs()
        assert (off <= rounding_bound(W, R, A, B)).all()

    @pytest.mark.parametrize("sampler", SAMPLERS)
    @pytest.mark.parametrize("dtype", SIXTEEN_BIT_DTYPES, ids=str)
    @pytest.mark.parametrize("exact", [None, False])
    @given(ANY_LAYOUT, SIZES, SIZES, st.data(), SEEDS)
    def test_merge_after_init_in_16_bit_is_within_the_rounding_bound(
        self, sampler, dtype, exact, layout, m, n, data, seed
    ):
        module = scattered_layer(layout, m, n, dtype, seed)
        r = data.draw(st.integers(1, min(m, n)))
        state = adapt_every_weight(module, r, exact=exact, sampler=sampler, key=seed)
        assert ("compensation" in state.keys()) == (exact is None)
        W, R, A, B = matrix_and_factors(module.weight, state)
        off = (rosa_func.merge(state)["weight"].flatten(1) - W).abs()
        assert (off <= rounding_bound_in_16_bit(W, R, A, B, kept=exact is None)).all()

    @pytest.mark.parametrize("before", SAMPLERS)
    @pytest.mark.parametrize("after", SAMPLERS)
    @settings(max_examples=5)
    @given(ANY_LAYOUT, SIZES, SIZES, ANY_WIDE_DTYPE, st.data(), SEEDS)
    def test_an_exact_resample_keeps_the_merged_weight(
        self, before, after, layout, m, n, dtype, data, seed
    ):
        ranks = [data.draw(st.integers(1, min(m, n))) for _ in range(2)]
        module = scattered_layer(layout, m, n, dtype, seed)
        state = perturbed(
            adapt_every_weight(module, ranks[0], exact=True, sampler=before, key=seed), seed=seed
        )
        new = rosa_func.resample(state, seed, r=ranks[1], sampler=after)
        assert torch.equal(rosa_func.merge(new)["weight"], rosa_func.merge(state)["weight"])

    @pytest.mark.parametrize("before", SAMPLERS)
    @pytest.mark.parametrize("after", SAMPLERS)
    @settings(max_examples=5)
    @given(ANY_LAYOUT, SIZES, SIZES, ANY_WIDE_DTYPE, st.data(), SEEDS)
    def test_resample_keeps_the_merged_weight_within_the_rounding_bound(
        self, before, after, layout, m, n, dtype, data, seed
    ):
        r = data.draw(st.integers(1, min(m, n)))
        module = scattered_layer(layout, m, n, dtype, seed)
        state = perturbed(adapt_every_weight(module, r, sampler=before, key=seed), seed=seed)
        new = rosa_func.resample(state, seed, sampler=after)
        W, R, A, B = matrix_and_factors(rosa_func.merge(state)["weight"], new)
        off = (rosa_func.merge(new)["weight"].flatten(1) - W).abs()
        assert (off <= rounding_bound(W, R, A, B)).all()

    @given(ANY_LAYOUT, SIZES, SIZES, ANY_16_BIT_DTYPE, ANY_SAMPLER, SEEDS)
    def test_an_exact_resample_in_16_bit_moves_by_one_unit_in_the_last_place(
        self, layout, m, n, dtype, sampler, seed
    ):
        module = scattered_layer(layout, m, n, dtype, seed)
        state = perturbed(
            adapt_every_weight(module, 1, exact=True, sampler=sampler, key=seed), seed=seed
        )
        old = rosa_func.merge(state)["weight"].double()
        new = rosa_func.merge(rosa_func.resample(state, seed))["weight"].double()
        # Both round a sum that is the same up to 2**-53: they differ only near a tie.
        unit = torch.finfo(dtype).eps * old.abs() + torch.finfo(dtype).smallest_normal
        assert ((new - old).abs() <= unit).all()

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
    @settings(max_examples=4)  # of a thousand resamples each
    @given(ANY_SAMPLER, st.integers(8, 24), st.integers(8, 24), st.integers(1, 8), SEEDS)
    def test_1000_idle_resamples_in_float32(self, sampler, m, n, r, seed):
        module = nn.Linear(n, m, bias=False)
        module.load_state_dict({"weight": randn(m, n, seed=seed)})
        state = rosa_func.init(module, r, sampler=sampler)
        for step in range(1000):
            state = rosa_func.resample(state, seed + step, sampler=sampler)
        W = module.weight.detach()
        assert (rosa_func.merge(state)["weight"] - W).norm() <= 1e-5 * W.norm()

    @given(ANY_SAMPLER, st.integers(8, 48), st.integers(8, 48), st.integers(1, 8), SEEDS)
    def test_100_idle_resamples_in_bfloat16(self, sampler, m, n, r, seed):
        module = nn.Linear(n, m, bias=False).bfloat16()
        module.load_state_dict({"weight": randn(m, n, seed=seed)})
        state = rosa_func.init(module, r, sampler=sampler)
        for step in range(100):
            state = rosa_func.resample(state, seed + step, sampler=sampler)
        W = module.weight.detach().double()
        assert (unrounded(state, "weight") - W).norm() <= 1e-4 * W.norm()

    @settings(max_examples=6)
    @given(st.sampled_from([samplers.random, samplers.projection]), SEEDS)
    def test_small_changes_of_a_bfloat16_weight_are_kept(self, sampler, seed):
        """Each cycle changes W by 1e-5 relative, along one direction's part in its subspace.

        After all cycles the change is 1e-3. The drift of the test above is 2e-5, in a random
        direction, so 1 / sqrt(m n) of it lies along the change: 2e-4 of the change here, and 1e-3
        of it at 20 x 20.
        """
        module = nn.Linear(128, 96, bias=False).bfloat16()
        module.load_state_dict({"weight": randn(96, 128, seed=seed)})
        W = module.weight.detach().double()
        state, intended = rosa_func.init(module, 20, key=seed), torch.zeros_like(W)
        direction = randn(96, 128, seed=seed + 1)
        for step in range(100):
            A, B = (state["trainable", "weight", factor] for factor in "AB")
            dB = torch.linalg.pinv(A) @ direction
            dB *= 1e-5 * W.norm() / (A @ dB).norm()
            intended += A.double() @ ((B + dB).double() - B.double())
            B += dB
            state = rosa_func.resample(state, seed + step, sampler=sampler)
        realised = ((unrounded(state, "weight") - W) * intended).sum() / intended.square().sum()
        assert intended.norm() >= 4e-4 * W.norm()
        assert abs(realised.item() - 1) <= 1e-3


class TestOneCycle:
    @given(ANY_LAYOUT, SIZES, SIZES, ANY_SAMPLER, st.data(), SEEDS)
    def test_the_change_of_one_cycle_has_at_most_rank_2r(self, layout, m, n, sampler, data, seed):
        r = data.draw(st.integers(1, min(m, n)))
        module = scattered_layer(layout, m, n, torch.float64, seed)
        state = adapt_every_weight(module, r, sampler=sampler, exact=True)
        trained = perturbed(state, seed=seed)
        change = rosa_func.merge(trained)["weight"] - module.weight.detach()
        assert torch.linalg.matrix_rank(change.flatten(1), rtol=1e-9) <= 2 * r

    @given(ANY_SAMPLER, ANY_LAYOUT, SIZES, SIZES, ANY_WIDE_DTYPE, st.data(), SEEDS)
    def test_the_residual_is_bit_identical_while_training(
        self, sampler, layout, m, n, dtype, data, seed
    ):
        module = scattered_layer(layout, m, n, dtype, seed)
        state = adapt_every_weight(module, data.draw(st.integers(1, min(m, n))), sampler=sampler)
        before, start = state["frozen"].clone(), state["trainable"].clone()
        optimizer = torch.optim.AdamW(rosa_func.parameters(state), 0.1)
        for step in range(3):
            x = layout.input(m, n, dtype, seed + step)
            optimizer.zero_grad()
            rosa_func.call(module, state, x).square().sum().backward()
            optimizer.step()
        assert all(torch.equal(before[name], t) for name, t in state["frozen"].items())
        assert not torch.equal(start["weight", "B"], state["trainable", "weight", "B"])


class TestPurity:
    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_no_function_changes_the_state_or_the_model(self, sampler):
        module = nn.Sequential(scattered_layer(LINEAR, 6, 5, torch.float32, 0), nn.BatchNorm1d(6))
        model, rng = model_snapshot(module), torch.get_rng_state()
        state = rosa_func.init(module, 2, sampler=sampler, train="1", exact=True)
        rosa_func.parameters(state)
        before = state_bytes(state)
        new = rosa_func.resample(state, 1, sampler=sampler)
        rosa_func.merge(state), rosa_func.compose(state), rosa_func.count(state)
        assert state_bytes(state) == before
        assert model_snapshot(module) == model
        assert torch.equal(torch.get_rng_state(), rng)
        assert not any(t.requires_grad for t in new.values(True, True))

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

    def test_additive_keeps_the_input_side_of_each_layout(self):
        for layout in LAYOUTS:
            state = adapt_every_weight(layout.build(5, 7), 2, sampler=samplers.lora)
            new = rosa_func.resample(state, 1, sampler=samplers.additive)["trainable", "weight"]
            input_side, output_side = "AB"[layout.input_dim], "AB"[1 - layout.input_dim]
            assert new[input_side].any() and not new[output_side].any()

    def test_resample_takes_factors_that_require_gradients(self):
        state = rosa_func.init(nn.Linear(12, 10), 2)
        rosa_func.parameters(state)
        assert not rosa_func.resample(state, 1)["trainable", "weight", "A"].requires_grad
