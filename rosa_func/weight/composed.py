"""The composed weight: a tensor that stands for a weight without forming it."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rosa_func._torch import (
    is_eager,
    is_fake,
    is_old_dynamo,
    is_traced,
    is_wrapped,
    operator_name,
    outside_transforms,
    tree_map,
    without_autocast,
    without_torch_function,
    written,
)
from rosa_func.weight.parts import Weight, cast, dense, pulled, rebuilt, tensors
from rosa_func.weight.read_only import ReadOnly, computed, write_error
from rosa_func.weight.sharded import in_one_pass

# What a function does with a composed weight. The tables are filled by rules.py. A rule takes the
# function and its arguments. It returns NotImplemented where the dense weight is to be formed.
RULES: dict[Any, Callable[..., Any]] = {}
OPERATOR_RULES: dict[str | None, Callable[..., Any]] = {}  # of operators, by their names


class Composed(ReadOnly):
    """A tensor of a weight's shape that stands for R + A B wherever it is used as a weight.

    It computes by differentiable operations on the parts. Under a transform of torch.func or a
    compiler these are plain ones.
    """

    weight: Weight
    matrices: "tuple[Any, list[Composed]]"  # of a batch: their `_moment`, and they

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Apply the parts where a rule is known, else form the dense weight."""
        with without_torch_function():
            if func in METADATA:
                return func(*args, **(kwargs or {}))
            rule = RULES.get(func) or OPERATOR_RULES.get(operator_name(func))
            if rule is not None and (not kwargs or kwargs.keys() <= _OPTIONS):
                try:
                    result = rule(func, *args, **(kwargs or {}))
                except NotImplementedError:
                    result = NotImplemented
                if result is not NotImplemented:
                    return result
            return computed(func, args, kwargs or {}, formed)


class Dispatched(Composed):
    """A composed weight that answers below autograd too, where no `__torch_function__` was asked.

    An example is an input of a class that runs the function itself. Compilers cannot follow this.
    """

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Any = None,
    ) -> Any:
        """Form the dense weight; its gradient is that of `_Outside`."""
        with without_torch_function():
            for value in written(func, args, kwargs or {}):
                if isinstance(value, Composed):
                    raise write_error(func, value)
            args, kwargs = tree_map(lambda value: _seen_below(value, func), (args, kwargs or {}))
            return func(*args, **kwargs)


def composed(w: Weight) -> Tensor:
    """Return a tensor that looks like the residual of w and stands for w.

    What trains takes the residual's dtype.
    """
    return all_composed({"": w})[""]


def all_composed(weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    """Return `composed` of each; weights of one shape share one tensor of NaN.

    Compilers and modes that cannot follow those are given the dense weights.
    """
    refuse_tracing()
    weights = in_one_pass(weights)
    if is_old_dynamo() or is_fake():
        return {name: dense(w) for name, w in weights.items()}
    computed_with = [_in_one_dtype(w) for w in weights.values()]
    return dict(zip(weights, all_standing_for(computed_with), strict=True))


def _in_one_dtype(w: Weight) -> Weight:
    """Return the weight with terms of the base's dtype."""
    terms = tuple([cast(term, w.base.dtype) for term in w.terms])
    return Weight(w.base, terms, w.input_dim)


def refuse_tracing() -> None:
    """Refuse torch.jit.trace by name: its own errors lead nowhere."""
    if is_traced():
        raise ValueError(
            "torch.jit.trace cannot follow the composed weights of a state: trace the merged "
            "model, rosa_func.export.to_module(model, state)"
        )


def standing_for(w: Weight) -> Composed:
    """Return a tensor that looks like the weight and stands for it."""
    return all_standing_for([w])[0]


def all_standing_for(weights: list[Weight]) -> list[Composed]:
    """Return `standing_for` of each; weights of one shape share one tensor of NaN."""
    kind = Composed if torch.compiler.is_compiling() else Dispatched
    is_recorded = torch.is_grad_enabled() and is_eager()
    looks: dict[tuple[torch.Size, torch.dtype, torch.device], Tensor] = {}
    found: list[Composed] = []
    with outside_transforms():  # which would put a tensor without `__torch_dispatch__` round each
        for w in weights:
            if is_recorded and any(t.requires_grad for t in tensors(w)):
                seen = _Outside.apply(w, *tensors(w))  # type: ignore[no-untyped-call]
            else:
                key = w.shape, w.base.dtype, w.base.device
                if key not in looks:
                    looks[key] = _nothing_like(w)
                seen = looks[key].mT if w.flipped else looks[key]
            stand_in = seen.as_subclass(kind)
            stand_in.weight = w
            found.append(stand_in)
    return found


def _nothing_like(w: Weight) -> Tensor:
    """Return NaN of the weight's shape, without its memory: no code may take R for the weight."""
    return torch.full((), math.nan, dtype=w.base.dtype, device=w.base.device).expand(w.shape)


class _Outside(torch.autograd.Function):
    """The gradient of a weight that is used where `__torch_function__` is not asked.

    An example is an autograd.Function of the model: its forward pass sees the whole weight, and
    its backward pass returns the gradient of the whole weight.
    """

    @staticmethod
    def forward(ctx: Any, w: Weight, *values: Tensor) -> Tensor:
        ctx.weight = w
        ctx.save_for_backward(*values)
        return _nothing_like(w).mT if w.flipped else _nothing_like(w)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        def whole(*values: Tensor) -> Tensor:
            return dense(rebuilt(ctx.weight, values))

        return None, *pulled(whole, ctx.saved_tensors, ctx.needs_input_grad[1:], d)


def formed(value: Any, func: Callable[..., Any]) -> Any:
    """Return the dense weight for a composed one, anything else as it is."""
    if not isinstance(value, Composed):
        return value
    w, name = value.weight, getattr(func, "__name__", func)
    # To show it may take long; and a warning would break a compiler's graph.
    if w.is_batch() and name != "__repr__" and not torch.compiler.is_compiling():
        warnings.warn(
            f"{name} forms a batch of {tuple(w.shape)} weights, since "
            "it has no rule by which factors are applied: that is right, and slow",
            stacklevel=4,
        )
    with without_autocast(w.base.device):
        return dense(w)


def _seen_below(value: Any, func: Callable[..., Any]) -> Any:
    """Return the dense weight, as `formed`, where its gradient is not lost."""
    if isinstance(value, Composed):
        values = tensors(value.weight)
        followed = torch.is_grad_enabled() and any(t.requires_grad for t in values)
        if any(map(is_wrapped, values)) or (followed and not value.requires_grad):
            raise TypeError(
                f"{func} is computed with a weight of shape {tuple(value.shape)} that stands for "
                "R + A B by code that does not ask its class, where its derivative would be lost: "
                "leave it out of targets"
            )
    return formed(value, func)


def as_dense(value: Tensor) -> Tensor:
    """Return the dense weight for a composed one, another tensor as it is."""
    return dense(value.weight) if isinstance(value, Composed) else value


def getter(attribute: str) -> Any:
    """Return the function by which an attribute of a tensor is read."""
    return getattr(Tensor, attribute).__get__


# The arguments that rules take by name. A call with any other forms the dense weight.
_OPTIONS = {
    *("bias", "stride", "padding", "dilation", "groups"),
    *("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    *("offsets", "mode", "per_sample_weights", "include_last_offset"),
    *("dim0", "dim1", "offs", "out_dtype"),
}

# What can be answered without the weight's values. Strides are those that a compiler sees.
METADATA = {
    *map(getter, ("shape", "dtype", "device", "ndim", "layout", "itemsize", "nbytes")),
    *map(getter, ("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "nelement", "ndimension")),
    *(getattr(Tensor, name) for name in ("is_floating_point", "is_complex", "element_size")),
    *(getattr(Tensor, name) for name in ("get_device", "data_ptr", "__len__", "stride")),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}
