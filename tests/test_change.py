"""The change of a fine-tuned model as factors of the smallest rank."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn

import rosa_func
from cases import ANY_WIDE_DTYPE, SIXTEEN_BIT_DTYPES
from models import seeded, tiny_gpt2
from references import perturbed, relative_distance
from rosa_func import checkpoint


def trained_for_cycles(model: nn.Module, r: int, cycles: int, **options: Any) -> TensorDict:
    state = perturbed(rosa_func.init(model, r, **options))
    for cycle in range(1, cycles):
        state = perturbed(rosa_func.resample(state, cycle), seed=cycle)
    return state


class TestDelta:
    @given(
        r=st.integers(1, 3),
        cycles=st.integers(1, 3),
        dtype=ANY_WIDE_DTYPE,
    )
    def test_delta_has_the_rank_of_the_change_and_gives_the_weights_back(
        self, r: int, cycles: int, dtype: torch.dtype
    ):
        model = seeded(lambda: nn.Sequential(nn.Linear(40, 32), nn.Linear(32, 36))).to(dtype)
        state = trained_for_cycles(model, r, cycles, train="*.bias")
        change = checkpoint.delta(state, model)
        merged = rosa_func.merge(state)
        for name, value in change["change"].items():
            D = (merged[name] - model.get_parameter(name).detach()).double()
            singular = torch.linalg.svdvals(D)
            k = value["A"].shape[1]
            assert k <= 2 * r * cycles
            limit = 1e-7 * merged[name].double().norm()
            assert singular[k:].norm() <= limit
            assert k == 0 or singular[k - 1 :].norm() > limit * (1 - 1e-6)
            error = (D - value["A"].double() @ value["B"].double()).norm()
            eps = torch.finfo(dtype).eps
            stated = float(change["error", name] * merged[name].double().norm())
            assert abs(float(error) - stated) <= 2 * eps * float(D.norm())
        weights = checkpoint.apply_delta(model, change)
        assert weights.keys() == merged.keys()
        assert all(relative_distance(weights[name], merged[name]) <= 1e-6 for name in merged)
        assert torch.equal(weights["0.bias"], merged["0.bias"])

    def test_delta_of_a_given_rank_has_the_eckart_young_error(self):
        model = seeded(lambda: nn.Sequential(nn.Linear(40, 32)))
        state = trained_for_cycles(model, 3, 2)
        change = checkpoint.delta(state, model, rank=4)
        W = rosa_func.merge(state)["0.weight"].double()
        singular = torch.linalg.svdvals(W - model[0].weight.detach().double())
        assert change["change", "0.weight", "A"].shape == (32, 4)
        floor = singular[4:].norm() / W.norm()
        torch.testing.assert_close(change["error", "0.weight"], floor, rtol=1e-6, atol=1e-8)
        whole = checkpoint.delta(state, model, rank=1000)
        assert whole["change", "0.weight", "B"].shape == (32, 40)

    @pytest.mark.parametrize("exact", [None, True])
    def test_delta_after_many_exact_cycles_has_no_noise_to_factor(self, exact: bool | None):
        model = seeded(lambda: nn.Sequential(nn.Linear(80, 64)))
        state = rosa_func.init(model, 2, exact=exact)
        for cycle in range(150):
            state = rosa_func.resample(state, cycle)
        rank = checkpoint.delta(state, model)["change", "0.weight", "A"].shape[1]
        assert rank == 0 if exact else rank > 0  # what the docstring warns of

    def test_delta_of_an_unchanged_model_is_empty(self, tmp_path: Path):
        model = seeded(lambda: nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6)))
        state = rosa_func.init(model, 2, exact=True, train="*.bias")
        change = checkpoint.delta(state, model)
        assert change["change", "0.weight", "A"].shape == (6, 0)
        assert not change["full"].keys()
        checkpoint.save(tmp_path / "delta.safetensors", change)
        change, _ = checkpoint.load(tmp_path / "delta.safetensors")
        weights = checkpoint.apply_delta(model, change)
        assert all(torch.equal(weights[n], t) for n, t in model.state_dict().items())

    @pytest.mark.parametrize("dtype", SIXTEEN_BIT_DTYPES, ids=str)
    def test_delta_gives_16_bit_weights_as_merge_rounds_them(self, dtype: torch.dtype):
        model = seeded(lambda: nn.Sequential(nn.Linear(40, 32))).to(dtype)
        state = trained_for_cycles(model, 2, 3)
        weights = checkpoint.apply_delta(model, checkpoint.delta(state, model))
        merged = rosa_func.merge(state)["0.weight"]
        assert weights["0.weight"].dtype == dtype
        # Both round a sum known to the precision of float32: near a tie they may differ.
        differ = weights["0.weight"] != merged
        assert differ.float().mean() < 0.01
        assert relative_distance(weights["0.weight"], merged) < torch.finfo(dtype).eps

    def test_delta_of_tied_and_convolution_weights(self, tmp_path: Path):
        model = seeded(lambda: tiny_gpt2(layers=1))
        state = perturbed(rosa_func.init(model, 2, targets=["wte", "c_attn"], train="ln_f"))
        checkpoint.save(tmp_path / "delta.safetensors", checkpoint.delta(state, model), base="tiny")
        change, extra = checkpoint.load(tmp_path / "delta.safetensors")
        assert extra == {"base": "tiny"}
        weights = checkpoint.apply_delta(model, change)
        merged = rosa_func.merge(state)
        assert all(relative_distance(weights[name], merged[name]) <= 1e-6 for name in merged)
        conv = seeded(lambda: nn.Sequential(nn.Conv2d(3, 5, 2)))
        state = perturbed(rosa_func.init(conv, 2, targets="*weight"))
        weights = checkpoint.apply_delta(conv, checkpoint.delta(state, conv))
        assert relative_distance(weights["0.weight"], rosa_func.merge(state)["0.weight"]) <= 1e-6

    @pytest.mark.parametrize("exact", [None, True])
    def test_delta_of_a_convolution_with_channels_last(self, exact: bool | None):
        conv = seeded(lambda: nn.Sequential(nn.Conv2d(8, 8, 3)))
        conv = conv.to(memory_format=torch.channels_last)
        state = perturbed(rosa_func.init(conv, 2, targets="0", exact=exact))
        weights = checkpoint.apply_delta(conv, checkpoint.delta(state, conv))
        assert relative_distance(weights["0.weight"], rosa_func.merge(state)["0.weight"]) <= 1e-6

    def test_apply_delta_tells_names_apart_that_wrappers_could_have_made_the_same(self):
        model = nn.ModuleDict({"module": nn.Linear(4, 4, bias=False)})
        model.weight = nn.Parameter(torch.eye(4))
        state = perturbed(rosa_func.init(model, 2, targets="*weight"))
        weights = checkpoint.apply_delta(model, checkpoint.delta(state, model))
        for name, merged in rosa_func.merge(state).items():
            assert relative_distance(weights[name], merged) <= 1e-6
        change = checkpoint.delta(state, model)
        with pytest.raises(KeyError, match=r"changes (module\.)?weight"):
            checkpoint.apply_delta(torch.compile(model, backend="eager"), change)


class TestDeltaRefusals:
    def test_delta_refuses_wrong_arguments(self):
        model = seeded(lambda: nn.Sequential(nn.Linear(7, 6)))
        state = rosa_func.init(model, 2)
        with pytest.raises(ValueError, match=r"at least 0, got -1"):
            checkpoint.delta(state, model, tol=-1)
        with pytest.raises(ValueError, match=r"positive int, got 0"):
            checkpoint.delta(state, model, rank=0)
        with pytest.raises(ValueError, match=r"\(6, 7\) in the state and \(6, 9\)"):
            checkpoint.delta(state, nn.Sequential(nn.Linear(9, 6)))

    def test_apply_delta_refuses_another_model(self):
        model = seeded(lambda: nn.Sequential(nn.Linear(7, 6)))
        change = checkpoint.delta(rosa_func.init(model, 2), model)
        with pytest.raises(ValueError, match=r"0.weight of shape \(6, 7\).*of shape \(6, 9\)"):
            checkpoint.apply_delta(nn.Sequential(nn.Linear(9, 6)), change)
        with pytest.raises(KeyError, match=r"0\.weight.*Linear"):
            checkpoint.apply_delta(nn.Linear(7, 6), change)
        with pytest.raises(KeyError, match="no entry 'change'"):
            checkpoint.apply_delta(model, rosa_func.init(model, 2))
