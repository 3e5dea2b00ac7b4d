"""Laplace over what trains in a state: how sure a prediction is by the curvature around it.

    p(y | x) = softmax(f / sqrt(1 + pi v / 8)),    v_c = sum_p J_cp^2 / (F_pp + prior)

with J the Jacobian of the logits f of a row by all that trains, and F the diagonal of the Fisher
information sum_n J^T (diag(p) - p p^T) J over the rows of training.

Sources: MacKay 1992, "The evidence framework applied to classification networks" (the formula of
p); Immer et al. 2021, "Improving predictions of Bayesian neural nets via local linearization".
"""

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import jacrev, vmap

import rosa_func


def jacobian(model: nn.Module, state: TensorDict, x: Tensor) -> Tensor:
    """Return the derivatives of the logits of a row by all that trains: classes x values."""

    def logits(trainable: TensorDict) -> Tensor:
        return rosa_func.call(model, state.replace(trainable=trainable), x[None])[0]

    by_leaf = jacrev(logits)(state["trainable"])
    return torch.cat([J.flatten(1) for J in by_leaf.values(True, True)], 1)


def fisher_diagonal(model: nn.Module, state: TensorDict, x: Tensor) -> Tensor:
    """Return the diagonal of the Fisher information of rows, by all that trains."""

    def of_row(x: Tensor) -> Tensor:
        J, p = jacobian(model, state, x), rosa_func.call(model, state, x[None])[0].softmax(-1)
        return p @ J.square() - (p @ J).square()

    return vmap(of_row, chunk_size=100)(x).sum(0)


def softened(model: nn.Module, state: TensorDict, F_: Tensor, prior: float, x: Tensor) -> Tensor:
    """Return the probabilities of rows, by a Gaussian of the factors around the state."""

    def variance(x: Tensor) -> Tensor:
        return jacobian(model, state, x).square() @ (1 / (F_ + prior))

    spread = vmap(variance, chunk_size=100)(x)
    return (rosa_func.call(model, state, x) / (1 + torch.pi * spread / 8).sqrt()).softmax(-1)
