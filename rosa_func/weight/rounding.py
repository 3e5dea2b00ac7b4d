"""The arithmetic of a split, W -> base, lost, and of its reversal, a weight -> W."""

import torch
from torch import Tensor

from rosa_func.weight.dense import Dense
from rosa_func.weight.keeping import Kept, kept_as
from rosa_func.weight.low_bits import CODES, decoded, encoded
from rosa_func.weight.low_rank import LowRank
from rosa_func.weight.parts import Base, Part, Term, Weight, mapped, trainable

_SIXTEEN_BIT = (torch.float16, torch.bfloat16)
SUPPORTED = (*_SIXTEEN_BIT, torch.float32, torch.float64)


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the factors of a weight: float32 for a 16-bit one, else its own."""
    return torch.float32 if dtype in _SIXTEEN_BIT else dtype


def compensation_dtype(dtype: torch.dtype, exact: bool | None) -> torch.dtype | None:
    """Return the dtype in which the rounding error of a residual is kept, None for not at all.

    By default it is the next eight bits, see `low_bits`. Not so where all of it is kept. For a
    16-bit weight the error has the bits that R rounded away *and* those of W below P's last
    place. Float32 loses the latter where |W| < 2**-24 |P|, which happens a few times in 10**8
    weights, so exactness takes float64 there. In float32 and float64 the error of one subtraction
    is a number of the same dtype (Knuth, TAOCP 2, 4.2.2).
    """
    if exact is None:
        return CODES if dtype in _SIXTEEN_BIT else None
    if not exact:
        return None
    return torch.float64 if dtype in _SIXTEEN_BIT else dtype


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return s = fl(a + b) and e with s + e = a + b exactly (Knuth's TwoSum)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def split(
    W: Tensor, factors: LowRank, like: Base, kept: Kept | None, own: bool = False
) -> tuple[Base, Tensor | None]:
    """Return R = W - A B, stored as `like` is, and what storing took, kept as `kept` says.

    W is in the dtype of `like`, or in the wider one in which `join` returns it. If `own`, R may be
    written over W: fresh pages cost as much as the arithmetic. The factors come from `aligned`.
    """
    A, B = factors
    if not (A.any() and B.any()):  # nothing is subtracted: R is W, its storage too
        return _stored(like, W, None, kept)
    if kept is None or kept.dtype == CODES:
        wide = W.to(A.dtype)
        return _stored(like, factors.taken_from(wide, own or wide is not W), None, kept)
    dtype = torch.promote_types(A.dtype, kept.dtype)
    return _stored(like, *two_sum(W.to(dtype), -factors.product(W.shape).to(dtype)), kept)


def join(w: Weight) -> Tensor:
    """Return W, unrounded: in float64 or float32 where the weight has 16 bits.

    Where all of a loss is kept, R + A B = h + l exactly. If the two cancel, l = 0 and h + lost is
    rounded once. Otherwise l + lost is at most a unit in the last place of R, and its own rounding
    error is of the order of that squared. So a W that is a number of R's dtype comes back bit for
    bit.
    """
    h, left = _sum(w)
    return h if left is None else h + left


def computed(w: Weight) -> Tensor:
    """Return the weight that a model computes with, unrounded.

    That is W, but for a base that takes more than rounding does: what that took is left out.
    """
    return join(w._replace(lost=None) if w.base.coarse else w)


def absorbed(w: Weight, term: Term) -> Weight:
    """Return the weight without an additive term, which its base has taken in: R' = R + P.

    With what storing took, R' + lost' = R + lost + P up to a rounding of the order of eps^2, or of
    the codes that are kept.
    """
    others = tuple(other for other in w.terms if other is not term)
    if not any(value.any() for value in trainable(term).values()):
        return w._replace(terms=others)
    h, left = _sum(w._replace(terms=(term,)))
    if left is not None:
        h, left = two_sum(h, left)
    base, lost = _stored(w.base, h, left, kept_as(w))
    return w._replace(base=base, terms=others, lost=lost)


def aligned(part: Part) -> Part:
    """Copy a term into fresh memory: the bits of a BLAS product depend on strides and alignment.

    A @ B is formed when W is split and again when it is joined, and must be the same both times.
    """
    fields: tuple[str, ...] = part._fields  # type: ignore[attr-defined]
    return mapped(part, lambda t: t.detach().clone(memory_format=torch.contiguous_format), fields)


def _sum(w: Weight) -> tuple[Tensor, Tensor | None]:
    """Return W as h + l, l = None where what the sums round off is not kept."""
    _refuse_cast(w)
    R, terms = w.base.dense().detach(), [aligned(term) for term in w.terms]
    if w.lost is None or w.lost.dtype == CODES:
        if w.lost is not None and w.lost.numel():
            h = decoded(R, w.lost.to(R.device, non_blocking=True))
        else:
            h = R.to(factor_dtype(R.dtype))
        for term in terms:
            is_own = h is not R
            h = term.added_to(h, is_own) if isinstance(term, LowRank) else term.fold(h)
        return h, None
    wide = torch.promote_types(factor_dtype(R.dtype), w.lost.dtype)
    h = R.to(wide)
    left: Tensor | None = None
    if w.lost.numel():
        left = w.lost.to(h.device, non_blocking=True).to(wide)
    for term in terms:
        if term.product is None:
            h, left = term.fold(h if left is None else h + left), None
        else:
            h, error = two_sum(h, term.product(h.shape).to(wide))
            left = error if left is None else error + left
    return h, left


def _stored(
    like: Base, h: Tensor, left: Tensor | None, kept: Kept | None
) -> tuple[Base, Tensor | None]:
    """Store h as `like` is; return what that took, and what is left, kept as `kept` says.

    Where nothing is lost, what is kept has no elements.
    """
    base: Base
    lost: Tensor | None
    if kept is not None and kept.dtype == CODES and h.dtype != like.dtype:
        R, lost = encoded(h, like.dtype)
        base = Dense(R)
    else:
        base, lost = like.store(h)
        if left is not None:
            lost = left if lost is None else lost + left
    if kept is None:
        return base, None
    return base, kept.keep(h.new_empty(0) if lost is None or is_zero(lost) else lost)


def is_zero(lost: Tensor) -> bool:
    """Return whether nothing was lost."""
    if not lost.numel():
        return True
    low, high = lost.aminmax()  # `any` takes 30 times as long of codes
    return bool(low == 0) and bool(high == 0)


def _refuse_cast(w: Weight) -> None:
    """Refuse a weight whose codes were cast, or the residual that they belong to."""
    if w.lost is None or not w.lost.numel():
        return
    # `state.to(dtype)` casts every tensor of a state, the integers too.
    is_of_another = w.lost.dtype == CODES and w.base.dtype not in _SIXTEEN_BIT
    if is_of_another or w.input_dim.is_floating_point():
        raise ValueError(
            f"a weight was cast to {w.base.dtype}, and what rounding took from its residual before "
            "cannot be cast: cast the model, and use init, or merge, and cast what it returns"
        )
