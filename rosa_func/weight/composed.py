"""The composed weight: a tensor that stands for a weight without forming it."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rosa_func._torch import (
    GROUPED_PRODUCTS,
    is_eager,
    is_old_dynamo,
    operator_name,
    tree_map,
    without_autocast,
    without_torch_function,
)
from rosa_func.weight import product
from rosa_func.weight.parts import Weight, cast, dense, rebuilt, tensors, unbound


class Composed(Tensor):
    """A tensor of a weight's shape that stands for R + A B wherever it is used as a weight.

    Made of differentiable operations on the parts, plain ones wherever a transform of torch.func
    or a compiler is at work.
    """

    weight: Weight
    matrices: "list[Composed]"  # of a batch, once one is asked for

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Apply the parts where a rule is known, else form the dense weight."""
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        with without_torch_function():
            rule = _RULES.get(func) or _OPERATOR_RULES.get(operator_name(func))
            if rule is not None and (not kwargs or kwargs.keys() <= _OPTIONS):
                try:
                    result = rule(func, *args, **(kwargs or {}))
                except NotImplementedError:
                    result = NotImplemented
                if result is not NotImplemented:
                    return result
            if args and isinstance(args[0], Composed) and _writes(func.__name__):
                raise TypeError(
                    f"{func.__name__} would write to a weight of shape {tuple(args[0].shape)} "
                    "that stands for R + A B: make a new tensor of it, or leave it out of targets"
                )
            args, kwargs = tree_map(lambda value: _formed(value, func), (args, kwargs or {}))
            return func(*args, **kwargs)


def composed(w: Weight) -> Tensor:
    """Return a tensor that looks like the residual of w and stands for w.

    What trains takes the residual's dtype.
    """
    return all_composed({"": w})[""]


def all_composed(weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    """Return `composed` of each; those of one shape share what they look like.

    A compiler that cannot follow those is given the dense weights.
    """
    if is_old_dynamo():
        return {name: dense(w) for name, w in weights.items()}
    looks: Looks = {}
    found: dict[str, Tensor] = {}
    for name, w in weights.items():
        terms = tuple(cast(term, w.base.dtype) for term in w.terms)
        found[name] = _standing_for(Weight(w.base, terms, w.input_dim), looks)
    return found


# What a weight looks like from outside, by shape, dtype and device.
Looks = dict[tuple[torch.Size, torch.dtype, torch.device], Tensor]


def _standing_for(w: Weight, looks: Looks) -> Composed:
    values = tensors(w)
    if torch.is_grad_enabled() and is_eager() and any(t.requires_grad for t in values):
        seen = _Outside.apply(w, *values)  # type: ignore[no-untyped-call]
    else:
        key = w.shape, w.base.dtype, w.base.device
        if key not in looks:
            looks[key] = _nothing_like(w)
        seen = looks[key].mT if w.flipped else looks[key]
    stand_in: Composed = seen.as_subclass(Composed)
    stand_in.weight = w
    return stand_in


def _nothing_like(w: Weight) -> Tensor:
    """Return NaN of the weight's shape, without its memory: no code may take R for the weight."""
    return tensors(w)[0].new_full((), math.nan, dtype=w.base.dtype).expand(w.shape)


class _Outside(torch.autograd.Function):
    """The gradient of a weight that is used where `__torch_function__` is not asked.

    Such as in an autograd.Function of the model's own, whose forward pass sees the whole weight
    and whose backward pass returns the gradient of the whole.
    """

    @staticmethod
    def forward(ctx: Any, w: Weight, *values: Tensor) -> Tensor:
        ctx.weight = w
        ctx.save_for_backward(*values)
        return _nothing_like(w).mT if w.flipped else _nothing_like(w)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            values = ctx.saved_tensors
            if not again:
                values = tuple(
                    value.detach().requires_grad_(needed)
                    for value, needed in zip(values, ctx.needs_input_grad[1:], strict=True)
                )
            W = dense(rebuilt(ctx.weight, values))
            trained = [value for value in values if value.requires_grad]
            found = iter(torch.autograd.grad(W, trained, d, create_graph=again))
        return None, *(next(found) if value.requires_grad else None for value in values)


def _writes(name: str) -> bool:
    """Return whether an operation of that name writes to its first argument."""
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _formed(value: Any, func: Callable[..., Any]) -> Any:
    """Return the dense weight for a composed one, anything else as it is."""
    if not isinstance(value, Composed):
        return value
    w = value.weight
    if w.is_batch():
        warnings.warn(
            f"{getattr(func, '__name__', func)} forms a batch of {tuple(w.shape)} weights, since "
            "it has no rule by which factors are applied: that is right, and slow",
            stacklevel=4,
        )
    with without_autocast(w.base.device):
        return dense(w)


def _is_weight(w: Any, *others: Any) -> bool:
    return isinstance(w, Composed) and not any(isinstance(other, Composed) for other in others)


def _linear(func: Any, x: Any, w: Any, bias: Any = None) -> Any:
    if isinstance(x, Composed) or isinstance(bias, Composed):
        return NotImplemented
    return product.right(x, w.weight, bias, flipped=not w.weight.flipped)


def _addmm(func: Any, bias: Any, x: Any, w: Any) -> Any:
    if not _is_weight(w, x, bias):
        return NotImplemented
    return product.right(x, w.weight, bias, flipped=w.weight.flipped)


def _matmul(func: Any, left: Any, right: Any) -> Any:
    if _is_weight(right, left):
        w = right.weight
        if right.ndim == 2:
            return product.right(left, w, flipped=w.flipped)
        return product.batched(left, w, flipped=w.flipped) if left.ndim > 1 else NotImplemented
    if _is_weight(left, right):  # W x = (x^T W^T)^T
        w = left.weight
        if left.ndim > 2:
            flipped = not w.flipped
            return product.batched(right.mT, w, flipped).mT if right.ndim > 1 else NotImplemented
        if right.ndim == 1:
            return product.right(right, w, flipped=not w.flipped)
        return product.right(right.mT, w, flipped=not w.flipped).mT
    return NotImplemented


def _rmatmul(func: Any, right: Any, left: Any) -> Any:
    return _matmul(func, left, right)


def _embedding(
    func: Any,
    indices: Any,
    w: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if max_norm is not None or scale_grad_by_freq or not _is_weight(w, indices) or w.ndim != 2:
        return NotImplemented
    weight = w.weight
    if weight.flipped or not all(term.ndim == 2 and term.rows for term in weight.terms):
        return NotImplemented
    # torch.embedding ignores autocast, so the factors' product does.
    with without_autocast(w.device):
        rows = func(indices, weight.base.dense())
        for term in weight.terms:
            more = term.rows(func, indices)
            if padding_idx is not None:
                # A padded row gives no gradient to the weight, so none to A and none to B.
                padded = (indices == padding_idx % w.shape[0]).unsqueeze(-1)
                more = torch.where(padded, more.detach(), more)
            rows = rows + more
    return rows


def _embedding_bag(func: Any, indices: Any, w: Any, *args: Any, **kwargs: Any) -> Any:
    """Form the weight, whose gradient is dense even where that of a parameter would be sparse."""
    if not _is_weight(w, indices):
        return NotImplemented
    args = (*args[:5], False, *args[6:])
    return func(indices, _formed(w, func), *args, **kwargs)


def _convolution(
    func: Any,
    x: Any,
    w: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if groups != 1 or not _is_weight(w, x, bias) or w.weight.flipped:
        return NotImplemented
    base, terms = w.weight.base, w.weight.terms
    if not all(term.ndim == 2 and term.convolve for term in terms):
        return NotImplemented
    out = func(x, base.dense(), bias, stride, padding, dilation)
    for term in terms:
        out = out + term.convolve(func, x, base.shape, stride, padding, dilation)
    return out


def _transpose(func: Any, w: Any, *dims: Any, **named: Any) -> Any:
    dims, ndim = (*dims, *named.values()), w.ndim
    swaps_last_two = not dims or {dim % ndim for dim in dims} == {ndim - 2, ndim - 1}
    # Without dimensions, only mT is about the last two of more than two.
    is_known = ndim == 2 or (w.weight.is_batch() and (dims or func == _getter("mT")))
    return _standing_for(_flipped(w.weight), {}) if is_known and swaps_last_two else NotImplemented


def _getitem(func: Any, w: Any, index: Any) -> Any:
    """Take one matrix of a batch, or several."""
    weight = w.weight
    if not weight.is_batch() or not isinstance(index, int | Tensor) or isinstance(index, bool):
        return NotImplemented
    if isinstance(index, Tensor) and (index.is_floating_point() or index.dtype == torch.bool):
        return NotImplemented
    if weight.base.select is None or not all(term.select for term in weight.terms):
        return NotImplemented
    if weight.base.dense().ndim == 3 and (not isinstance(index, Tensor) or _is_place(index)):
        if not hasattr(w, "matrices"):
            looks: Looks = {}
            w.matrices = [_standing_for(each, looks) for each in unbound(weight)]
        return w.matrices[int(index)]
    base = weight.base.select(index)
    terms = tuple(term.select(index) for term in weight.terms)
    return _standing_for(weight._replace(base=base, terms=terms), {})


def _is_place(index: Tensor) -> bool:
    """Return whether an index is one number, which can be read without a compiler's notice."""
    return index.ndim == 0 and is_eager()


def _grouped(
    func: Any, x: Any, w: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    if not _is_weight(w, x) or x.ndim != 2 or offs is None or bias is not None or out_dtype:
        return NotImplemented
    return product.grouped(lambda x, M: func(x, M, offs=offs), x, w.weight)


def _requires_grad(func: Any, w: Any) -> bool:
    # Not that of a dense weight, which is False where gradients are off.
    return any(t.requires_grad for t in tensors(w.weight))


def _flipped(w: Weight) -> Weight:
    return w._replace(flipped=not w.flipped)


def _getter(attribute: str) -> Any:
    return getattr(Tensor, attribute).__get__


# The operations in which modules use their weights.
_RULES: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    F.conv3d: _convolution,
    torch.addmm: _addmm,
    **dict.fromkeys(
        [torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm], _matmul
    ),
    Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: _rmatmul,
    **dict.fromkeys(
        [torch.t, Tensor.t, torch.transpose, Tensor.transpose, *map(_getter, ("T", "mT"))],
        _transpose,
    ),
    Tensor.__getitem__: _getitem,
    **dict.fromkeys(GROUPED_PRODUCTS, _grouped),
    _getter("requires_grad"): _requires_grad,
}

# Of operators that exist only once their library is imported.
_OPERATOR_RULES: dict[str | None, Callable[..., Any]] = {
    "transformers::grouped_mm_fallback": _grouped,
}

# What the rules take by name; whatever else is given so is left to the dense weight.
_OPTIONS = {
    *("bias", "stride", "padding", "dilation", "groups"),
    *("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    *("dim0", "dim1", "offs", "out_dtype"),
}

# What can be answered without the weight's values. Strides are those of what a compiler can see.
_METADATA = {
    *map(_getter, ("shape", "dtype", "device", "ndim", "layout", "itemsize", "nbytes")),
    *map(_getter, ("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "nelement", "ndimension")),
    *(getattr(Tensor, name) for name in ("is_floating_point", "is_complex", "element_size")),
    *(getattr(Tensor, name) for name in ("get_device", "data_ptr", "__len__", "stride")),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}
