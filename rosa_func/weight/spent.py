"""Spent tensors: those whose memory a function was given, by `donate=True`."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor

from rosa_func._torch import is_alias, tree_leaves, turn_into, without_torch_function
from rosa_func.weight.composed import METADATA, getter


class Spent(Tensor):
    """A tensor whose memory was donated: to use it is an error, to ask for its shape is none."""

    reason: str
    before: type[Tensor]  # what it was

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answer what needs no values, and refuse the rest."""
        if func in _METADATA:
            with without_torch_function():
                return func(*args, **(kwargs or {}))
        refuse_spent(tree_leaves((args, kwargs)))
        return NotImplemented

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Say what it is."""
        return f"Spent({self.reason})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse to be copied or pickled."""
        raise ValueError(self.reason)


def spend(tensor: Tensor, reason: str) -> None:
    """Let go of a tensor's memory, and refuse every later use with the reason.

    Where its class is not asked, as inside the functions of composed weights, it is NaN.
    """
    is_number = tensor.dtype.is_floating_point or tensor.dtype.is_complex
    value = math.nan if is_number else 0
    nothing = torch.full((), value, dtype=tensor.dtype, device=tensor.device)
    tensor.data = nothing.expand(tensor.shape)
    kind = type(tensor)
    turn_into(tensor, Spent)
    tensor.reason, tensor.before = reason, kind  # type: ignore[attr-defined]


def restore(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor, spent or not, other values, of whatever shape; it stays the same object.

    Its gradient, if that of other values, is dropped, and a graph that waits for its backward pass
    knows that it was written to.
    """
    if tensor is value:
        return
    if tensor.is_leaf and not (type(tensor) is Spent or is_alias(tensor, value)):
        tensor.grad = None
    if type(tensor) is Spent:
        turn_into(tensor, tensor.before)
    tensor.data = value.detach()
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def refuse_spent(values: Iterable[Any]) -> None:
    """Refuse spent tensors."""
    for value in values:
        if type(value) is Spent:
            raise ValueError(value.reason)


_METADATA = METADATA | {
    *map(getter, ("requires_grad", "is_leaf", "is_nested", "grad", "grad_fn", "_version")),
    *(Tensor.grad.__set__, Tensor.grad.__delete__),  # type: ignore[union-attr]
    *(torch.empty_like, Tensor.is_shared, Tensor.is_inference, Tensor.is_contiguous),
}
