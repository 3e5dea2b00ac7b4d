"""Bad input of sparse parts: an error that names it, and nothing is changed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rosa_func
from cases import with_sparse
from models import randn, two_layers
from references import (
    model_snapshot,
    state_bytes,
)
from rosa_func import sparse


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    result = model(batch)
    return getattr(result, "logits", result).square().mean()


@pytest.mark.parametrize(
    ("density", "error", "parts"),
    [
        *((d, ValueError, [r"lies in \(0, 1\]", str(d)]) for d in (0, -0.1, 1.5, float("nan"))),
        (True, TypeError, ["True", "bool"]),
        ("0.5", TypeError, ["'0.5'", "str"]),
        (torch.tensor(0.5), TypeError, ["Tensor"]),
        (None, TypeError, ["None"]),
        ({"2.wieght": 0.5}, ValueError, ["2.wieght"]),
        ({"0.weight": 2.0}, ValueError, ["2.0"]),
        ({3: 0.5}, TypeError, ["patterns", "3"]),
    ],
)
def test_densities(density, error, parts):
    state = rosa_func.init(two_layers(), 2)
    before = state_bytes(state)
    scores = {"0.weight": torch.ones(4, 6), "2.weight": torch.ones(8, 4)}
    for choose in (
        lambda: sparse.support(scores, density),
        lambda: sparse.support(scores, density, across="model"),
        lambda: sparse.support_random(state, density, 0),
    ):
        with pytest.raises(error, match=".*".join(parts)):
            choose()
    assert state_bytes(state) == before


@pytest.mark.parametrize(
    ("scores", "parts"),
    [
        ({"w": torch.tensor([[1.0, float("nan")]])}, ["w", "not finite"]),
        ({"w": torch.tensor([[1.0, float("inf")]])}, ["w", "not finite"]),
        ({"w": torch.ones(4)}, ["w", r"\(4,\)", "no matrix"]),
        ({"w": torch.ones(0, 4)}, ["w", r"\(0, 4\)", "no matrix"]),
    ],
)
def test_scores(scores, parts):
    for across in ("weight", "model"):
        with pytest.raises(ValueError, match=".*".join(parts)):
            sparse.support(scores, 0.5, across=across)


def test_words():
    model = two_layers()
    state = rosa_func.init(model, 2)
    with pytest.raises(ValueError, match="mean_square, mean_abs, got 'square'"):
        sparse.scores(model, state, [randn(4, 6)], loss_of, how="square")
    with pytest.raises(ValueError, match="weight, model, got 'layer'"):
        sparse.support({}, 0.5, across="layer")
    with pytest.raises(TypeError, match="key"):
        sparse.support_random(state, 0.5, "0")


@pytest.mark.parametrize(
    ("support", "error", "parts"),
    [
        ({"0.weight": torch.tensor([3, 5, 3])}, ValueError, ["0.weight", "3 more than once"]),
        ({"0.weight": torch.tensor([3, 24])}, ValueError, ["0.weight", "3 to 24", "0 to 23"]),
        ({"0.weight": torch.tensor([-1, 2])}, ValueError, ["0.weight", "-1 to 2"]),
        ({"0.weight": torch.tensor([], dtype=torch.int32)}, ValueError, [r"\(0,\)", "4 x 6"]),
        ({"0.weight": torch.tensor(3)}, ValueError, [r"shape \(\)", r"\(k,\)"]),
        ({"0.weight": torch.zeros(4, 6, dtype=torch.int64)}, ValueError, [r"\(4, 6\)"]),
        ({"0.weight": torch.ones(24, dtype=torch.bool)}, TypeError, ["integers", "bool"]),
        ({"0.weight": torch.tensor([1.0])}, TypeError, ["integers", "float32"]),
        ({"0.weight": torch.tensor([1j])}, TypeError, ["integers", "complex64"]),
        ({"0.weight": [1, 2]}, TypeError, ["0.weight", "integers", "list"]),
        ({"0.bias": torch.tensor([1])}, KeyError, ["0.bias", "no adapted"]),
        ({"nowhere": torch.tensor([1])}, KeyError, ["nowhere", "no adapted"]),
        ({}, KeyError, ["no weight"]),
        (torch.tensor([1, 2]), TypeError, ["mapping", "Tensor"]),
        # The first is in order.
        ({"2.weight": torch.tensor([1]), "0.weight": torch.tensor([99])}, ValueError, ["99"]),
    ],
    ids=str,
)
def test_supports(support, error, parts):
    state = rosa_func.init(two_layers(), 2)
    before = state_bytes(state)
    with pytest.raises(error, match=".*".join(parts)):
        sparse.add(state, support)
    assert state_bytes(state) == before


def test_a_second_sparse_part_and_none():
    state = rosa_func.init(two_layers(), 2)
    new = sparse.add(state, {"0.weight": torch.tensor([1])})
    before = state_bytes(new)
    with pytest.raises(ValueError, match=r"0\.weight has a sparse part.*remove"):
        sparse.add(new, {"2.weight": torch.tensor([1]), "0.weight": torch.tensor([2])})
    assert state_bytes(new) == before
    assert list(sparse.add(new, {"2.weight": torch.tensor([1])})["fixed"].keys()) == [
        "0.weight",
        "2.weight",
    ]
    with pytest.raises(ValueError, match="no weight of the state has a sparse part"):
        sparse.remove(state)


@pytest.mark.parametrize(
    ("batches", "loss", "parts"),
    [
        ([], loss_of, ["batches is empty"]),
        ([1, 2], lambda model, x: model(randn(4, 6)), ["scalar", "batch 0", r"\(4, 8\)"]),
        ([1], lambda model, x: 3.0, ["scalar", "batch 0", "3.0"]),
        ([1], lambda model, x: None, ["scalar", "None"]),
        ([1], lambda model, x: torch.tensor(2.0), ["2.0", "does not depend"]),
        ([1], lambda model, x: model[0].bias.sum(), ["does not depend"]),
        ([1, 0], lambda m, x: m(randn(4, 6)).sum() / x, ["batch 1", "inf"]),
        ([0.0], lambda m, x: m(randn(4, 6)).sum() * x / x, ["batch 0", "nan"]),
    ],
)
def test_batches_and_losses(batches, loss, parts):
    model = two_layers()
    state = with_sparse(rosa_func.init(model, 2, train="0.bias"), 0.2)
    rosa_func.parameters(state)
    before, bytes_before = model_snapshot(model), state_bytes(state)
    tensors = [torch.tensor(float(x)) for x in batches]
    with pytest.raises(ValueError, match=".*".join(parts)):
        sparse.scores(model, state, tensors, loss)
    assert state_bytes(state) == bytes_before and model_snapshot(model) == before
    assert all(leaf.grad is None for leaf in rosa_func.parameters(state))


def test_a_model_that_writes_to_a_frozen_tensor():
    """It wrote to the state and the model unsaid."""

    class Writes(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.bias.add_(0)
            return super().forward(x)

    model = Writes(6, 4)
    state = rosa_func.init(model, 2)
    with pytest.raises(RuntimeError, match="wrote to bias"):
        sparse.scores(model, state, [randn(3, 6)], loss_of)
