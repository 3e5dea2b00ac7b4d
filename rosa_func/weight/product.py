"""Products with a weight that is not formed: x W = x R + (x A) B.

A term that cannot be applied beside R is folded into the copy of R that this product uses.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rosa_func._torch import is_autocast, is_eager
from rosa_func.weight import formed
from rosa_func.weight.dense import Dense
from rosa_func.weight.parts import Base, Weight, dense, pulled, rebuilt, tensors


def right(x: Tensor, w: Weight, bias: Tensor | None = None, *, flipped: bool) -> Tensor:
    """Return x W + bias, or x W^T + bias, W being a matrix and x having any number of rows.

    Raises NotImplementedError where a part can only be folded in.
    """
    if not _can_apply(w, 2) or x.is_nested:
        raise NotImplementedError
    lead = x.shape[:-1]
    if len(lead) == 1:
        rows = x
    elif x.layout is torch.strided:
        rows = x.reshape(-1, x.shape[-1])
    else:
        raise NotImplementedError
    if not is_eager() or is_autocast(x.device) or (bias is not None and bias.ndim != 1):
        out = _sum(rows, w, bias, flipped)
    elif not torch.is_grad_enabled():
        out = _sum_in_place(rows, w, bias, flipped)[0]
    elif any(t.requires_grad for t in _base(w)) or any(term.pull is None for term in w.terms):
        out = _sum(rows, w, bias, flipped)
    else:
        out = _InPlace.apply(w, flipped, bias, rows, *tensors(w))  # type: ignore[no-untyped-call]
    return out if len(lead) == 1 else out.view(*lead, out.shape[-1])


def batched(x: Tensor, w: Weight, flipped: bool) -> Tensor:
    """Return x[e] W[e] for each matrix of a batch; raises as `right`."""
    if not w.is_batch() or not _can_apply(w, len(w.shape)):
        raise NotImplementedError
    if any(term.apply is None for term in w.terms):
        out = folded(torch.matmul, x, w._replace(flipped=flipped))
    else:
        out = formed.applied(w.base, x, flipped, None)
    return _with_applied(w, x, flipped, out)


def grouped(product: Callable[..., Tensor], x: Tensor, w: Weight) -> Tensor:
    """Return x W[e] for the rows x of each group e, by a product of groups; raises as `right`."""
    if not w.is_batch() or any(t.grouped is None and t.through is None for t in w.terms):
        raise NotImplementedError
    out = folded(product, x, w)
    for term in w.terms:
        if term.grouped is not None:
            more = term.grouped(product, x, w.flipped)
            out = out.add_(more) if is_eager() else out + more
    return out


def folded(product: Callable[..., Tensor], x: Tensor, w: Weight, *others: Tensor) -> Tensor:
    """Return product(x, R, *others), with the terms in R that can only be folded in.

    Where there are such, or R itself has to be formed, it is not kept for a backward, but formed
    again.
    """
    terms = tuple(term for term in w.terms if term.apply is None)
    w = w._replace(terms=terms)
    is_stored = len(terms) == 0 and w.base.apply is not None
    if is_stored or not is_eager() or is_autocast(x.device):
        return product(x, dense(w), *others)
    out: Tensor = _FormedAgain.apply(product, w, len(others), x, *others, *tensors(w))  # type: ignore[no-untyped-call]
    return out


def _can_apply(w: Weight, ndim: int) -> bool:
    """Return whether all terms can be in products with weights of so many dimensions."""
    for term in w.terms:
        if term.ndim != ndim or (term.apply is None and term.through is None):
            return False
    return len(w.base.shape) == ndim


def _base(w: Weight) -> tuple[Tensor, ...]:
    return tuple(w.base)  # type: ignore[arg-type]


def _folded(w: Weight) -> Base:
    """Return a base that can be applied: R, with the terms in it that cannot."""
    within = [term for term in w.terms if term.apply is None]
    if not within and w.base.apply is not None:
        return w.base  # the usual case
    R = w.base.dense()
    for term in within:
        R = term.fold(R)
    return Dense(R)


def _with_applied(w: Weight, x: Tensor, flipped: bool, out: Tensor) -> Tensor:
    """Add to x R what the terms make of x."""
    for term in w.terms:
        if term.apply is not None:
            out = term.apply(x, flipped, out)
    return out


def _sum(x: Tensor, w: Weight, bias: Tensor | None, flipped: bool) -> Tensor:
    within = [term for term in w.terms if term.apply is None]
    if not within:
        out = formed.applied(w.base, x, flipped, bias)
    else:
        last = within[-1]
        others = tuple(term for term in w.terms if term is not last)
        out = last.through(x, _folded(w._replace(terms=others)).dense(), flipped)  # type: ignore[misc]
        out = out if bias is None else out + bias
    return _with_applied(w, x, flipped, out)


def _sum_in_place(
    x: Tensor, w: Weight, bias: Tensor | None, flipped: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the sum, and for each term what its `pull` is to be given."""
    out = _folded(w).apply(x, flipped, bias)  # type: ignore[misc]
    kept: list[Tensor | None] = []
    for term in w.terms:
        if term.apply_ is not None:
            kept.append(term.apply_(x, flipped, out))
        else:
            kept.append(None)
            if term.apply is not None:
                out = term.apply(x, flipped, out)
    return out, kept


class _InPlace(torch.autograd.Function):
    """The sum of a base's and its terms' products, each added in place.

    That saves passes over memory. It does not work under transforms of torch.func or autocast.
    The weight is given twice: as a whole, and as its tensors, which autograd can see.
    """

    @staticmethod
    def forward(
        ctx: Any, w: Weight, flipped: bool, bias: Tensor | None, x: Tensor, *values: Tensor
    ) -> Tensor:
        out, kept = _sum_in_place(x, w, bias, flipped)
        ctx.weight, ctx.flipped = w, flipped
        ctx.save_for_backward(x, *values, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        _, _, needs_bias, needs_x, *needs = ctx.needs_input_grad
        x, *saved = ctx.saved_tensors
        w, flipped = rebuilt(ctx.weight, saved), ctx.flipped
        kept = saved[len(needs) :]
        d_x = _folded(w).apply(d, not flipped, None) if needs_x else None  # type: ignore[misc]
        place = len(_base(w))
        gradients: list[Tensor | None] = [None] * place
        for term, inner in zip(w.terms, kept, strict=True):
            end = place + len(term._fields)
            # A second derivative goes through what was kept as well: it is computed again then.
            inner = None if torch.is_grad_enabled() else inner
            needed = tuple(needs[place:end])
            gradients += term.pull(x, d, inner, flipped, d_x, needed)  # type: ignore[misc]
            place = end
        return None, None, d.sum(0) if needs_bias else None, d_x, *gradients


class _FormedAgain(torch.autograd.Function):
    """The product with a weight that is formed for it, and once more in backward."""

    @staticmethod
    def forward(ctx: Any, product: Any, w: Weight, others: int, x: Tensor, *rest: Tensor) -> Tensor:
        def compute(x: Tensor, *rest: Tensor) -> Tensor:
            out: Tensor = product(x, dense(rebuilt(w, rest[others:])), *rest[:others])
            return out

        ctx.compute = compute
        ctx.save_for_backward(x, *rest)
        return compute(x, *rest)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        found = pulled(ctx.compute, ctx.saved_tensors, ctx.needs_input_grad[3:], d)
        return None, None, None, *found
