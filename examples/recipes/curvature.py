"""Curvature of a function of a TensorDict: products with its Hessian, and the Fisher matrix.

A state's `trainable` is such a TensorDict. No matrix is formed for a product H v, the derivative
along v (jvp) of the gradient, and conjugate gradients solve H x = g by such products.
"""

from collections.abc import Callable

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.func import grad, jacrev, jvp


def flat(t: TensorDict, batched: int = 0) -> Tensor:
    """Return all values side by side, behind that many dimensions of a batch."""
    leaves = t.values(include_nested=True, leaves_only=True)
    return torch.cat([leaf.flatten(batched) for leaf in leaves], dim=batched)


def hessian_product(f: Callable[[TensorDict], Tensor], t: TensorDict, v: TensorDict) -> TensorDict:
    """Return H v, the derivative of the gradient along v."""
    return jvp(grad(f), (t,), (v,))[1]


def conjugate_gradients(
    product: Callable[[TensorDict], TensorDict], g: TensorDict, tolerance: float = 1e-6
) -> TensorDict:
    """Return x with H x = g, for a positive definite H that is given by its products."""
    x, rest, direction = g * 0, g, g
    squared = start = flat(rest) @ flat(rest)
    while squared > tolerance**2 * start:
        Hd = product(direction)
        curvature = flat(direction) @ flat(Hd)
        if curvature <= 0:
            raise ValueError(
                "the curvature is not positive here: train longer, or raise the damping"
            )
        step = squared / curvature
        x, rest = x + direction * step, rest - Hd * step
        new = flat(rest) @ flat(rest)
        direction, squared = rest + direction * (new / squared), new
    return x


def fisher_matrix(
    logits: Callable[[TensorDict, Tensor], Tensor], t: TensorDict, x: Tensor
) -> Tensor:
    """Return (1/n) sum_i sum_y p_i(y) g_iy g_iy^T, with g_iy the gradient of log p_i(y)."""

    def of_row(row: Tensor) -> Tensor:
        log_p = logits(t, row).log_softmax(-1)
        each = jacrev(lambda t: logits(t, row).log_softmax(-1))(t)
        g = log_p.exp().sqrt().unsqueeze(-1) * flat(each, batched=1)
        return g.T @ g

    return sum(map(of_row, x)) / len(x)
