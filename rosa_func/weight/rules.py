"""The rules of composed weights: what each operation of a module does with its weight."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rosa_func._torch import GROUPED_PRODUCTS, is_eager, version, without_autocast
from rosa_func.weight import product
from rosa_func.weight.composed import (
    OPERATOR_RULES,
    RULES,
    Composed,
    all_standing_for,
    formed,
    getter,
    standing_for,
)
from rosa_func.weight.parts import Weight, tensors, unbound


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
    if weight.flipped or any(term.ndim != 2 or term.rows is None for term in weight.terms):
        return NotImplemented
    # torch.embedding ignores autocast, so the product of the factors does too.
    with without_autocast(w.device):
        base = weight.base
        rows = func(indices, base.dense()) if base.rows is None else base.rows(indices)
        for term in weight.terms:
            more = term.rows(func, indices, w.shape)
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
    return func(indices, formed(w, func), *args, **kwargs | {"sparse": False})


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
    if any(t.ndim != 2 or (t.convolve is None and t.through is None) for t in terms):
        return NotImplemented

    def convolution(x: Any, W: Any, bias: Any = None) -> Any:
        return func(x, W, bias, stride, padding, dilation)

    out = product.folded(convolution, x, w.weight, *(() if bias is None else (bias,)))
    for term in terms:
        if term.convolve is not None:
            out = out + term.convolve(func, x, base.shape, stride, padding, dilation)
    return out


def _transpose(func: Any, w: Any, *dims: Any, **named: Any) -> Any:
    dims, ndim = (*dims, *named.values()), w.ndim
    swaps_last_two = not dims or {dim % ndim for dim in dims} == {ndim - 2, ndim - 1}
    # Without dimensions, only mT is about the last two of more than two.
    is_known = ndim == 2 or (w.weight.is_batch() and (dims or func == getter("mT")))
    return standing_for(_flipped(w.weight)) if is_known and swaps_last_two else NotImplemented


def _getitem(func: Any, w: Any, index: Any) -> Any:
    """Take one matrix of a batch, or several."""
    weight = w.weight
    if not weight.is_batch() or not isinstance(index, int | Tensor) or isinstance(index, bool):
        return NotImplemented
    if isinstance(index, Tensor) and (index.is_floating_point() or index.dtype == torch.bool):
        return NotImplemented
    if weight.base.select is None or any(term.select is None for term in weight.terms):
        return NotImplemented
    if len(weight.base.shape) == 3 and (not isinstance(index, Tensor) or _is_place(index)):
        if not hasattr(w, "matrices") or w.matrices[0] != _moment(weight):
            w.matrices = _moment(weight), all_standing_for(unbound(weight))
        return w.matrices[1][int(index)]
    base = weight.base.select(index)
    terms = tuple(term.select(index) for term in weight.terms)
    return standing_for(weight._replace(base=base, terms=terms))


def _moment(w: Weight) -> Any:
    """Return a value that changes when matrices that were taken before can no longer be used.

    Inside a `bind`, gradients may be switched on and off, and an optimizer may step.
    """
    if not is_eager():
        return torch.compiler.is_compiling(), torch.is_grad_enabled()
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return *modes, *(version(t) for t in tensors(w))


def _is_place(index: Tensor) -> bool:
    """Return whether an index is one number that may be read here (a compiler would object)."""
    return index.ndim == 0 and is_eager()


def _grouped(
    func: Any, x: Any, w: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    if not _is_weight(w, x) or x.ndim != 2 or offs is None or bias is not None or out_dtype:
        return NotImplemented
    return product.grouped(lambda x, M: func(x, M, offs=offs), x, w.weight)


def _requires_grad(func: Any, w: Any) -> bool:
    # That of a dense weight would be False where gradients are off.
    return any(t.requires_grad for t in tensors(w.weight))


def _flipped(w: Weight) -> Weight:
    return w._replace(flipped=not w.flipped)


# The operations in which modules use their weights.
RULES.update(
    {
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
            [torch.t, Tensor.t, torch.transpose, Tensor.transpose, *map(getter, ("T", "mT"))],
            _transpose,
        ),
        Tensor.__getitem__: _getitem,
        **dict.fromkeys(GROUPED_PRODUCTS, _grouped),
        getter("requires_grad"): _requires_grad,
    }
)

# Operators exist only once their library is imported.
OPERATOR_RULES["transformers::grouped_mm_fallback"] = _grouped
