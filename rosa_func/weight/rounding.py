"""The arithmetic of a split, W -> base, lost, and of its reversal, a weight -> W."""

import torch
from torch import Tensor

from rosa_func.weight.low_rank import LowRank
from rosa_func.weight.parts import Base, Part, Term, Weight, mapped, trainable

_SIXTEEN_BIT = (torch.float16, torch.bfloat16)
SUPPORTED = (*_SIXTEEN_BIT, torch.float32, torch.float64)


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the factors of a weight: float32 for a 16-bit one, else its own."""
    return torch.float32 if dtype in _SIXTEEN_BIT else dtype


def compensation_dtype(dtype: torch.dtype, exact: bool | None) -> torch.dtype | None:
    """Return the dtype in which the rounding error of a residual is kept, None for not at all.

    For a 16-bit weight the error has the bits that R rounded away *and* those of W below P's last
    place. Float32 loses the latter where |W| < 2**-24 |P|, which happens a few times in 10**8
    weights, so exactness takes float64 there. In float32 and float64 the error of one subtraction
    is a number of the same dtype (Knuth, TAOCP 2, 4.2.2).
    """
    if exact is None:
        return dtype if dtype in _SIXTEEN_BIT else None
    if not exact:
        return None
    return torch.float64 if dtype in _SIXTEEN_BIT else dtype


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return s = fl(a + b) and e with s + e = a + b exactly (Knuth's TwoSum)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def split(
    W: Tensor, factors: LowRank, like: Base, kept: torch.dtype | None, own: bool = False
) -> tuple[Base, Tensor | None]:
    """Return R = W - A B, stored as `like` is, and what storing took, in the dtype `kept`.

    W is in the dtype of `like`, or in the wider one in which `join` returns it. If `own`, R may be
    written over W: fresh pages cost as much as the arithmetic. The factors come from `aligned`.
    Where nothing is lost, what is kept has no elements.
    """
    A, B = factors
    if not (A.any() and B.any()):  # nothing is subtracted: R is W, its storage too
        base, lost = like.store(W)
    elif kept is None and W.dtype == A.dtype:
        base, lost = like.store(factors.taken_from(W, own))
    else:
        wide = A.dtype if kept is None else torch.promote_types(A.dtype, kept)
        s, error = two_sum(W.to(wide), -factors.product(W.shape).to(wide))
        base, lost = like.store(s)
        lost = error if lost is None else lost + error
    if kept is None:
        return base, None
    return base, W.new_empty(0, dtype=kept) if lost is None else lost.to(kept)


def join(w: Weight) -> Tensor:
    """Return W, unrounded: in float64 or float32 where the weight has 16 bits.

    Where a loss is kept, R + A B = h + l exactly. If the two cancel, l = 0 and h + lost is rounded
    once. Otherwise l + lost is at most a unit in the last place of R, and its own rounding error is
    of the order of that squared. So a W that is a number of R's dtype comes back bit for bit.
    """
    R, terms = w.base.dense().detach(), [aligned(term) for term in w.terms]
    wide = factor_dtype(R.dtype)
    if w.lost is not None:
        wide = torch.promote_types(wide, w.lost.dtype)
    h = R.to(wide)
    if w.lost is None:
        for term in terms:
            h = term.fold(h)
        return h
    left: Tensor | None = None if not w.lost.numel() else w.lost.to(device=h.device, dtype=wide)
    for term in terms:
        if term.product is None:
            h, left = term.fold(h if left is None else h + left), None
        else:
            h, error = two_sum(h, term.product(h.shape).to(wide))
            left = error if left is None else error + left
    return h if left is None else h + left


def computed(w: Weight) -> Tensor:
    """Return the weight that a model computes with, unrounded.

    That is W, but for a base that takes more than rounding does: what that took is left out.
    """
    return join(w._replace(lost=None) if w.base.coarse else w)


def absorbed(w: Weight, term: Term) -> Weight:
    """Return the weight without an additive term, which its base has taken in: R' = R + P.

    With what storing took, R' + lost' = R + lost + P up to a rounding of the order of eps^2.
    """
    others = tuple(other for other in w.terms if other is not term)
    R = w.base.dense().detach()
    if not any(value.any() for value in trainable(term).values()):
        return w._replace(terms=others)
    wide = factor_dtype(R.dtype)
    if w.lost is not None:
        wide = torch.promote_types(wide, w.lost.dtype)
    P = term.product(R.shape).detach().to(wide)  # type: ignore[misc]
    s, error = two_sum(R.to(wide), P)
    if w.lost is not None and w.lost.numel():
        s, more = two_sum(s, error + w.lost.to(device=s.device, dtype=wide))
    else:
        s, more = two_sum(s, error)
    base, lost = w.base.store(s)
    if w.lost is None:
        return w._replace(base=base, terms=others)
    lost = more if lost is None else lost + more
    return w._replace(base=base, terms=others, lost=lost.to(w.lost.dtype))


def aligned(part: Part) -> Part:
    """Copy a term into fresh memory: the bits of a BLAS product depend on strides and alignment.

    A @ B is formed when W is split and again when it is joined, and must be the same both times.
    """
    fields: tuple[str, ...] = part._fields  # type: ignore[attr-defined]
    return mapped(part, lambda t: t.detach().clone(memory_format=torch.contiguous_format), fields)
