"""Tensors that may not be written to: composed weights, and what was formed of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rosa_func._torch import (
    VIEWED,
    counting_writes,
    is_alias,
    memory_of,
    tree_map,
    version,
    without_torch_function,
)

Function = Callable[..., Any]


class ReadOnly(Tensor):
    """A dense weight that was formed for one use, or a view of it.

    A write would change neither the weight nor the state, so it is refused.
    """

    @classmethod
    def __torch_function__(
        cls, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute with the values, and refuse to write over them."""
        if not all(issubclass(cls, kind) for kind in types):
            return NotImplemented
        with without_torch_function():
            return computed(func, args, kwargs or {}, lambda value, func: value)


def computed(
    func: Function,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    formed: Callable[[Any, Function], Any],
) -> Any:
    """Return what a function makes of the dense weights, which it may not write to.

    Nor may what shares their memory be written to: a model may mean the weight by it.

    Args:
        func: the function.
        args: its arguments.
        kwargs: its arguments by name.
        formed: (argument, func) -> the dense weight for a composed one, else the argument.
    """
    for value in _targets(func, args, kwargs):
        if isinstance(value, ReadOnly):
            raise write_error(func, value)
    if torch.compiler.is_compiling():  # which follows no memory
        args, kwargs = tree_map(lambda value: formed(value, func), (args, kwargs))
        result = func(*args, **kwargs)
        return result.as_subclass(ReadOnly) if func in _VIEWS else result
    weights: list[tuple[ReadOnly, Tensor, int]] = []

    def dense(value: Any) -> Any:
        if not isinstance(value, ReadOnly):
            return value
        with counting_writes():
            W = formed(value, func)
        weights.append((value, W, version(memory_of(W))))
        return W

    def guarded(value: Any) -> Any:
        if isinstance(value, Tensor) and any(is_alias(value, W) for _, W, _ in weights):
            return value.as_subclass(ReadOnly)
        if hasattr(value, "setflags"):  # an array of numpy
            value.setflags(write=False)
        return value

    args, kwargs = tree_map(dense, (args, kwargs))
    result = func(*args, **kwargs)
    for value, W, before in weights:
        if version(memory_of(W)) != before:
            raise write_error(func, value)
    return result if func == VIEWED else tree_map(guarded, result)


def write_error(func: Function, weight: ReadOnly) -> Exception:
    """Return the error for a function that would write to a weight."""
    name, is_copy = getattr(func, "__name__", str(func)), type(weight) is ReadOnly
    # Python takes a TypeError of `w += 1` for a wish to try `w = w + 1`.
    error = ValueError if name in _AUGMENTED else TypeError
    return error(
        f"{name} would write to {'a copy, made for this use, of ' * is_copy}a weight of shape "
        f"{tuple(weight.shape)} that stands for R + A B: make a new tensor of it, or leave it out "
        "of targets"
    )


def _targets(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return what a function writes to, as far as its name and options say."""
    out = kwargs.get("out")
    outs = list(out) if isinstance(out, tuple | list) else [out]
    in_place = func in _IN_PLACE or kwargs.get("inplace") is True
    return [*outs, *(args[:1] if in_place else ())]


# What writes to its first argument.
_IN_PLACE = {
    getattr(Tensor, name)
    for name in dir(Tensor)
    if name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
} | {Tensor.data.__set__}  # type: ignore[attr-defined]

# What `w += 1` and its like call.
_AUGMENTED = {"add_", "sub_", "mul_", "div_", "floor_divide_", "remainder_", "pow_"}

# What shares memory with its argument, for compilers, which cannot be asked.
_VIEWS = {
    *(torch.detach, Tensor.detach, Tensor.data.__get__, Tensor.__getitem__, Tensor.select),  # type: ignore[attr-defined]
    *(Tensor.view, Tensor.view_as, Tensor.flatten, Tensor.narrow, Tensor.diagonal),
}
