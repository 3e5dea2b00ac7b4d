"""Scores for a support: autograd's gradients of whole weights, one at a time."""

import warnings
import weakref
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import rosa_func
from cases import LAYOUTS, adapt_every_weight, with_sparse
from models import checkpoint_segments, randn, seeded, stock_moe, tiny_gpt2, token_ids, two_layers
from modules import TiedEmbedding
from references import (
    dense_weights,
    model_snapshot,
    perturbed,
    relative_distance,
    state_bytes,
    widened,
)
from rosa_func import sparse

EACH_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS, ids=str)
HOW = pytest.mark.parametrize("how", ["mean_square", "mean_abs"])


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    result = model(batch)
    return getattr(result, "logits", result).square().mean()


def dense_scores(
    model: nn.Module, state: TensorDict, batches: list[Tensor], how: str, wide: bool = True
) -> dict[str, Tensor]:
    """Return the scores by autograd's gradients of dense weights, in float64."""
    weights = dense_weights(widened(state) if wide else state)
    names = list(state["input_dim"].keys())
    adapted = [weights[name].detach().requires_grad_() for name in names]
    weights |= dict(zip(names, adapted, strict=True))
    sums = [torch.zeros(w.shape, dtype=torch.float64) for w in adapted]
    for batch in batches:
        result = functional_call(model, weights, (widened(batch) if wide else batch,))
        loss = getattr(result, "logits", result).square().mean()
        for total, G in zip(sums, torch.autograd.grad(loss, adapted), strict=True):
            total += G.double().square() if how == "mean_square" else G.double()
    means = [(total / len(batches)).abs() for total in sums]
    return {
        name: mean.flatten(1) if mean.ndim > 3 else mean
        for name, mean in zip(names, means, strict=True)
    }


def assert_scores(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert list(found) == list(expected)
    for name, score in found.items():
        assert score.shape == expected[name].shape and not score.requires_grad
        assert expected[name].any()
        assert relative_distance(score.double(), expected[name]) <= tolerance, name


class TestScores:
    @HOW
    @EACH_LAYOUT
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_they_are_those_of_autograd(self, layout, dtype, how):
        """With a sparse part in the state already, too."""
        module = seeded(lambda: layout.build(6, 8)).to(dtype)
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
        batches = [layout.input(6, 8, dtype, seed) for seed in range(3)]
        for state in (perturbed(adapt_every_weight(module, 2)), adapt_every_weight(module, 0)):
            for one in (state, with_sparse(state, 0.2)):
                found = sparse.scores(module, one, batches, loss_of, how=how)
                assert all(s.dtype.itemsize >= 4 for s in found.values())
                assert_scores(found, dense_scores(module, one, batches, how), tolerance)

    def test_a_weight_that_is_embedding_and_head(self):
        """Its two gradients are one: squares of each would be others."""
        module = seeded(TiedEmbedding)
        state = with_sparse(rosa_func.init(module, 2, targets="embed"), 0.1)
        batches = [torch.tensor([[1, 0, 8]]), torch.tensor([[2, 2, 5]])]
        found = sparse.scores(module, state, batches, loss_of)
        assert_scores(found, dense_scores(module, state, batches, "mean_square"), 1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
    def test_experts_of_transformers(self, implementation, dtype):
        case = stock_moe("mixtral", implementation, dtype)
        state = with_sparse(rosa_func.init(case.model, 2, targets="*experts*"), 0.05)
        batches = [token_ids(2, 6, seed=seed) for seed in range(2)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no batch is formed
            found = sparse.scores(case.model, state, batches, loss_of)
        expected = dense_scores(case.model, state, batches, "mean_square", wide=False)
        assert_scores(found, expected, 1e-5 if dtype == torch.float32 else 0.1)

    def test_a_model_whose_segments_are_computed_again(self):
        model = seeded(lambda: tiny_gpt2(layers=2))
        model.config.use_cache = False
        state = with_sparse(rosa_func.init(model, 2, targets=["wte", "c_attn", "c_fc"]), 0.05)
        batches = [token_ids(2, 6)]
        expected = dense_scores(model.train(), state, batches, "mean_square", wide=False)
        checkpoint_segments(model, {"use_reentrant": False})
        found = sparse.scores(model, state, batches, loss_of)
        assert_scores(found, expected, 1e-5)

    def test_a_layer_that_reentrant_checkpointing_runs_twice(self):
        """Its gradient comes in pieces, whose squares were summed: 0.011 off 0.016."""
        model, batch = Twice(), randn(4, 6).requires_grad_()
        state = rosa_func.init(model, 2)
        with pytest.raises(ValueError, match=r"layer\.weight comes in several pieces"):
            sparse.scores(model, state, [batch], loss_of)
        found = sparse.scores(model, state, [batch], loss_of, how="mean_abs")
        model.is_recomputed = False
        assert_scores(found, dense_scores(model, state, [batch], "mean_abs"), 1e-5)

    def test_a_model_that_cannot_be_copied(self):
        model, batches = Closure(), [randn(4, 6)]
        state, before = rosa_func.init(model, 2), model_snapshot(model)
        with pytest.raises(TypeError, match="copy cannot follow"):
            rosa_func.adapted(model, state)
        found = sparse.scores(model, state, batches, loss_of)
        assert_scores(found, dense_scores(model, state, batches, "mean_square"), 1e-5)
        assert model_snapshot(model) == before

    def test_leaves_and_their_gradients_stay(self):
        model = two_layers()
        state = with_sparse(rosa_func.init(model, 2, train="0.bias"), 0.2)
        before, leaves = model_snapshot(model), rosa_func.parameters(state)
        for leaf in leaves:
            leaf.grad = torch.full_like(leaf, 3.0)
        gradients, bytes_before = [leaf.grad for leaf in leaves], state_bytes(state)
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            batch = randn(4, 6)
            with mode():
                sparse.scores(model, state, [batch], loss_of)
        assert state_bytes(state) == bytes_before and model_snapshot(model) == before
        for leaf, g in zip(leaves, gradients, strict=True):
            assert leaf.grad is g and (g == 3).all()

    def test_one_gradient_at_a_time_is_in_memory(self):
        """Autograd, asked for all of them, holds all."""
        model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(8)))
        state = rosa_func.init(model, 2)

        with Alive(32, 32) as mode:
            sparse.scores(model, state, [randn(4, 32)], loss_of)
        assert 1 <= mode.most <= 2  # one goes as the next one comes
        with Alive(32, 32) as mode:
            torch.autograd.grad(loss_of(model, randn(4, 32)), list(model.parameters()))
        assert mode.most == 8

    def test_gradients_of_1e_minus_6_in_float16_do_not_tie(self):
        """Their squares are zero in float16, so a support of them was the first places."""
        module = nn.Linear(3, 5, bias=False).half()
        sizes = torch.tensor([1.0, 5.0, 3.0, 4.0, 2.0]) * 1e-6

        def loss(model: nn.Module, x: Tensor) -> Tensor:
            return (model(x).float() * sizes).sum()

        state = rosa_func.init(module, 1)
        found = sparse.scores(module, state, [torch.ones(1, 3, dtype=torch.float16)], loss)
        expected = sizes.half().double().square().unsqueeze(1).expand(5, 3)
        assert_scores(found, {"weight": expected}, 1e-6)
        assert sparse.support(found, 0.4)["weight"].tolist() == [3, 4, 5, 9, 10, 11]


def apply(function: Any, x: Tensor) -> Tensor:
    result: Tensor = function(x)
    return result


class Twice(nn.Module):
    """A layer that is run in two segments."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.is_recomputed = seeded(lambda: nn.Linear(6, 6)), True

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = (
                checkpoint(self.layer, x, use_reentrant=True)
                if self.is_recomputed
                else self.layer(x)
            )
            x = x.tanh()
        return x


class Closure(nn.Module):
    """A module that a function closes over."""

    def __init__(self) -> None:
        super().__init__()
        layer = self.layer = seeded(lambda: nn.Linear(6, 4))
        self.run = lambda x: layer(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.run(x)
        return result


class Alive(TorchDispatchMode):
    """Counts how many results of products of one shape are in memory at once."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape, self.alive, self.most = torch.Size(shape), weakref.WeakSet(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and result.shape == self.shape:
            self.alive.add(result)
            self.most = max(self.most, len(self.alive))
        return result
