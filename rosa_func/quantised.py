"""Quantised residuals: two ways to merge them, each with its error.

    state = init(model, r, quantize="nf4", master="cpu")

Residuals of adapted weights are stored in 4 or 8 bits a value. A product makes one of them dense,
and so does its backward; what trains is the same as with dense ones. The *master* is what
quantising took, so that R + master + A B is the weight in full: `resample` draws from it.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from tensordict import TensorDict
from torch import Tensor

from rosa_func.cycle import merge
from rosa_func.weight import Parts, Weight, read, rounding
from rosa_func.weight.parallel import map_weights

T = TypeVar("T")


class Merged(NamedTuple):
    """Dense weights, and their distance from those that the model computed with.

    It is what `merge_into_dequantised` and `merge_into_master` return.

    Attributes:
        weights: as of `merge`.
        errors: {name: |W - (R + A B)| / |W|}, Frobenius, of each adapted weight W.
    """

    weights: dict[str, Tensor]
    errors: dict[str, float]


def merge_into_dequantised(state: TensorDict) -> Merged:
    """Return the weights that were trained, and the error of rounding them to the model's dtype.

        W = R + A B,    R dequantised

    If W is quantised again, a quantisation error comes on top.

    Args:
        state: a state of `init(..., quantize=...)` or `resample`, trained or not.

    Returns:
        The weights of `merge(state)`, and {name: error}.

    Raises:
        ValueError: if no residual is quantised.
        KeyError: if an entry of the state is missing (named).

    Example:
        >>> import rosa_func, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> state = rosa_func.init(model, 2, quantize="nf4")
        >>> rosa_func.quantised.merge_into_dequantised(state).errors["0.weight"] < 1e-6
        True
    """
    adapted = _quantised(read(state))
    weights = merge(state)

    def error(name: str) -> float:
        return _distance(weights[name], rounding.computed(adapted[name]))

    return Merged(weights, _of_each(error, adapted))


def merge_into_master(state: TensorDict) -> Merged:
    """Return full-precision weights with the training added, and the error of quantising them.

        W = R + c + A B,    c what quantising took

    The master puts back what quantising took, and A B was trained without it. So W is nearer to
    the pretrained weights, and is not what was trained. A dev set says which of the two is better.

    Args:
        state: a state of `init(..., quantize=..., master=...)` or `resample`, trained or not.

    Returns:
        The weights as of `merge`, and {name: error}.

    Raises:
        ValueError: if no residual is quantised, or one has no master (named).
        KeyError: if an entry of the state is missing (named).

    Example:
        >>> import rosa_func, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> state = rosa_func.init(model, 2, quantize="nf4", master=True, exact=True)
        >>> merged = rosa_func.quantised.merge_into_master(state)
        >>> torch.equal(merged.weights["0.weight"], model[0].weight)
        True
        >>> 0.05 < merged.errors["0.weight"] < 0.15
        True
    """
    adapted = _quantised(read(state))
    if lacking := [name for name, w in adapted.items() if w.lost is None]:
        raise ValueError(
            f"{lacking[0]} is quantised without a master: init(..., master=...) keeps one; "
            "merge_into_dequantised needs none"
        )

    def whole(name: str) -> Tensor:
        return rounding.join(adapted[name]).to(adapted[name].base.dtype)

    trained, masters = merge(state), _of_each(whole, adapted)
    errors = {name: _distance(W, trained[name]) for name, W in masters.items()}
    return Merged(trained | masters, errors)


def _quantised(parts: Parts) -> dict[str, Weight]:
    adapted = parts.adapted()
    if not any(w.base.coarse for w in adapted.values()):
        raise ValueError("no residual of the state is quantised: rosa_func.merge(state) is exact")
    return adapted


def _of_each(work: Callable[[str], T], weights: dict[str, Weight]) -> dict[str, T]:
    return dict(zip(weights, map_weights(work, weights), strict=True))


def _distance(W: Tensor, other: Tensor) -> float:
    """Return |W - other| / |W|."""
    W = W.double()
    size = torch.linalg.vector_norm(W)
    return float(torch.linalg.vector_norm(W - other.double()) / torch.where(size > 0, size, 1))
