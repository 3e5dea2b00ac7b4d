"""Synthetic regression: a map 512 -> 32 whose true change has rank 24, linear or of two layers."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

import rosa_func
from examples.experiments.task import Forward, Metrics, Task

Batch = tuple[Tensor, Tensor]


def load(name: str, setting: dict[str, Any], seed: int) -> Task:
    """Return the task linear or two-layer; seed draws the maps and the data."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, setting.get("dtype", "float32"))
    wide, hidden, narrow = setting["widths"]
    shapes = {"linear": [(narrow, wide)], "two-layer": [(hidden, wide), (narrow, hidden)]}[name]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights, optima = [], []
    for rows, columns in shapes:
        weights.append(normal(rows, columns) / columns**0.5)
        rank = min(setting["true_rank"], rows, columns)
        change = normal(rows, rank) @ normal(rank, columns)
        optima.append(weights[-1] + change / change.norm() * weights[-1].norm())
    x = {split: normal(size, wide) for split, size in setting["rows"].items()}
    data = {split: (x[split].to(dtype), network(optima)(x[split]).to(dtype)) for split in x}
    model = network([W.to(dtype) for W in weights])
    with torch.no_grad():
        at_start = {split: F.mse_loss(model(x), y).item() for split, (x, y) in data.items()}

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        x, y = data["train"]
        while True:
            for rows in torch.randperm(len(x), generator=generator).split(setting["batch"]):
                yield x[rows], y[rows]

    def loss(forward: Forward, batch: Batch) -> Tensor:
        x, y = batch
        return F.mse_loss(forward(x), y) / at_start["train"]

    @torch.no_grad()
    def evaluate(forward: Forward, split: str) -> Metrics:
        x, y = data[split]
        return {"loss": F.mse_loss(forward(x), y).item() / at_start[split]}

    x, _ = data["train"]
    L = torch.linalg.cholesky(x.T @ x)
    exact = partial(solve, optimum=optima[0].to(dtype), L=L) if name == "linear" else None
    return Task(model, [], batches, loss, evaluate, solve=exact)


def network(weights: list[Tensor]) -> nn.Sequential:
    """Return linear layers of these weights (out x in), with tanh between them."""
    layers: list[nn.Module] = []
    for W in weights:
        linear = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(W)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1]).requires_grad_(False)


def solve(state: TensorDict, optimum: Tensor, L: Tensor) -> None:
    """Set A B to the least-squares solution of its rank: Eckart-Young in the metric L L^T of x."""
    A, B = (leaf.detach() for leaf in rosa_func.parameters(state))
    (R,) = state["frozen"].values()
    U, S, Vh = torch.linalg.svd((optimum - R) @ L, full_matrices=False)
    r = A.shape[1]
    A.copy_(U[:, :r] * S[:r])
    B.copy_(torch.linalg.solve_triangular(L, Vh[:r], upper=False, left=False))
