"""The composed weight: a tensor that stands for R + A B without forming it."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map


class Composed(Tensor):
    """A residual R that stands for R + A B wherever it is used as a weight.

    Made of differentiable operations on R, A and B, plain ones wherever a transform of torch.func
    or a compiler is at work.
    """

    R: Tensor
    A: Tensor
    B: Tensor

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Apply the factors where a rule is known, else form the dense weight."""
        kwargs = kwargs or {}
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        with torch._C.DisableTorchFunctionSubclass():
            if func in _RULES and kwargs.keys() <= _OPTIONS:
                result = _RULES[func](func, *args, **kwargs)
                if result is not NotImplemented:
                    return result
            if args and isinstance(args[0], Composed) and _writes(func.__name__):
                raise TypeError(
                    f"{func.__name__} would write to a weight of shape {tuple(args[0].R.shape)} "
                    "that stands for R + A B: make a new tensor of it, or leave it out of targets"
                )
            args, kwargs = tree_map(_dense, (args, kwargs))
            return func(*args, **kwargs)


def composed(R: Tensor, A: Tensor, B: Tensor) -> Composed:
    """Return a tensor that looks like R and stands for R + A B; A and B take R's dtype."""
    A, B = A.to(R.dtype), B.to(R.dtype)
    trained = torch.is_grad_enabled() and (A.requires_grad or B.requires_grad)
    seen = _Outside.apply(R, A, B) if trained and _is_eager() else _nothing_like(R)  # type: ignore[no-untyped-call]
    weight: Composed = seen.as_subclass(Composed)
    weight.R, weight.A, weight.B = R, A, B
    return weight


def _nothing_like(R: Tensor) -> Tensor:
    """Return NaN of R's shape, without its memory: no code may take R alone for the weight."""
    return R.new_full((), math.nan).expand(R.shape)


class _Outside(torch.autograd.Function):
    """The gradient of a weight that is used where `__torch_function__` is not asked.

    Such as in an autograd.Function of the model's own, whose forward pass sees R + A B and whose
    backward pass returns the gradient of the whole.
    """

    @staticmethod
    def forward(ctx: Any, R: Tensor, A: Tensor, B: Tensor) -> Tensor:
        ctx.save_for_backward(A, B)
        return _nothing_like(R)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        A, B = ctx.saved_tensors
        needs_R, needs_A, needs_B = ctx.needs_input_grad
        rows = d.flatten(1)
        return (
            d if needs_R else None,
            rows @ B.t() if needs_A else None,
            A.t() @ rows if needs_B else None,
        )


def _writes(name: str) -> bool:
    """Tell whether an operation of that name writes to its first argument."""
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _dense(value: Any) -> Any:
    if isinstance(value, Composed):
        return value.R + (value.A @ value.B).view(value.R.shape)
    return value


def _apply(x: Tensor, R: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x R + bias + (x A) B, for x of any number of rows, R: m x n."""
    rows = x.reshape(-1, x.shape[-1])
    if _is_plain(rows) and not R.requires_grad and (bias is None or bias.ndim == 1):
        out: Tensor = _InPlace.apply(rows, R, A, B, bias)  # type: ignore[no-untyped-call]
    else:
        out = torch.addmm(_base(rows, R, bias), rows @ A, B)
    return out.view(*x.shape[:-1], R.shape[-1])


def _base(rows: Tensor, R: Tensor, bias: Tensor | None) -> Tensor:
    return rows @ R if bias is None else torch.addmm(bias, rows, R)


class _InPlace(torch.autograd.Function):
    """The same product with each sum of two made in place, which saves passes over memory.

    Neither a transform of torch.func nor autocast can go through it.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, R: Tensor, A: Tensor, B: Tensor, bias: Tensor | None
    ) -> Tensor:
        inner = rows @ A
        ctx.save_for_backward(rows, R, A, B, inner)
        return _base(rows, R, bias).addmm_(inner, B)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        rows, R, A, B, inner = ctx.saved_tensors
        needs_rows, _, needs_A, needs_B, needs_bias = ctx.needs_input_grad
        if torch.is_grad_enabled():  # a second derivative goes through inner as well
            inner = rows @ A
        d_inner = d @ B.t()
        return (
            (d @ R.t()).addmm_(d_inner, A.t()) if needs_rows else None,
            None,
            _left_gradient(rows, d_inner) if needs_A else None,
            inner.t() @ d if needs_B else None,
            d.sum(0) if needs_bias else None,
        )


def _left_gradient(rows: Tensor, d_inner: Tensor) -> Tensor:
    """Return rows^T d_inner; a narrow one is quicker with r first, which autograd copies then."""
    return (d_inner.t() @ rows).t() if d_inner.shape[1] <= 32 else rows.t() @ d_inner


def _is_plain(x: Tensor) -> bool:
    """Tell whether neither a compiler, a transform, forward derivatives nor autocast is at work."""
    return _is_eager() and not torch.is_autocast_enabled(x.device.type)


def _is_eager() -> bool:
    """Tell whether neither a compiler, a transform nor forward derivatives are at work."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def _linear(func: Any, x: Any, w: Any, bias: Any = None) -> Any:
    if not _only_matrix(w, x, bias):
        return NotImplemented
    return _apply(x, w.R.t(), w.B.t(), w.A.t(), bias)


def _addmm(func: Any, bias: Any, x: Any, w: Any) -> Any:
    if not _only_matrix(w, x, bias):
        return NotImplemented
    return _apply(x, w.R, w.A, w.B, bias)


def _matmul(func: Any, left: Any, right: Any) -> Any:
    if _only_matrix(right, left):
        return _apply(left, right.R, right.A, right.B)
    if _only_matrix(left, right):
        return left.R @ right + left.A @ (left.B @ right)
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
    if max_norm is not None or scale_grad_by_freq or not _only_matrix(w, indices):
        return NotImplemented
    rows = func(indices, w.A) @ w.B
    if padding_idx is not None:
        # A padded row gives no gradient to the weight, so none to A and none to B.
        padded = (indices == padding_idx % w.R.shape[0]).unsqueeze(-1)
        rows = torch.where(padded, rows.detach(), rows)
    return func(indices, w.R) + rows


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
    if groups != 1 or not _only_weight(w, x, bias):
        return NotImplemented
    spatial = w.R.shape[2:]
    inner = func(x, w.B.view(-1, *w.R.shape[1:]), None, stride, padding, dilation)
    outer = func(inner, w.A.view(*w.A.shape, *(1 for _ in spatial)))
    return func(x, w.R, bias, stride, padding, dilation) + outer


def _transpose(func: Any, w: Any, *dims: Any, **named: Any) -> Any:
    dims = (*dims, *named.values())
    if w.R.ndim != 2 or (dims and {dim % 2 for dim in dims} != {0, 1}):
        return NotImplemented
    return composed(w.R.t(), w.B.t(), w.A.t())


def _requires_grad(func: Any, w: Any) -> bool:
    # Not that of a dense weight, which is False where gradients are off.
    return bool(w.R.requires_grad or w.A.requires_grad or w.B.requires_grad)


def _only_weight(w: Any, *others: Any) -> bool:
    return isinstance(w, Composed) and not any(isinstance(other, Composed) for other in others)


def _only_matrix(w: Any, *others: Any) -> bool:
    return _only_weight(w, *others) and w.R.ndim == 2


def _getter(attribute: str) -> Any:
    return getattr(Tensor, attribute).__get__


# The operations in which modules use their weights.
_RULES: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    F.conv3d: _convolution,
    torch.addmm: _addmm,
    **dict.fromkeys([torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__], _matmul),
    Tensor.__rmatmul__: _rmatmul,
    **dict.fromkeys(
        [torch.t, Tensor.t, torch.transpose, Tensor.transpose, *map(_getter, ("T", "mT"))],
        _transpose,
    ),
    _getter("requires_grad"): _requires_grad,
}

# What the rules take by name; whatever else is given so is left to the dense weight.
_OPTIONS = {
    *("bias", "stride", "padding", "dilation", "groups"),
    *("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    *("dim0", "dim1"),
}

# What can be answered from R alone.
_METADATA = {
    *map(_getter, ("shape", "dtype", "device", "ndim", "layout", "itemsize", "nbytes")),
    *map(_getter, ("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "nelement", "ndimension")),
    *(getattr(Tensor, name) for name in ("is_floating_point", "is_complex", "element_size")),
    *(getattr(Tensor, name) for name in ("get_device", "__len__")),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}
