"""How far rounding may take a merge from the weight, derived for each kind of dtype and base."""

import torch
from torch import Tensor

from rosa_func.weight import Weight
from rosa_func.weight.dense import Dense
from rosa_func.weight.low_rank import low_rank
from toys import Int8


def merge_bound(W: Tensor, w: Weight) -> Tensor:
    """Bound |merge - W| for a weight w of which only the factors are not at their start."""
    A, B = low_rank(w)
    matrices = (*A.shape[:-1], B.shape[-1])
    R = w.base.dense().view(matrices)
    if torch.finfo(W.dtype).bits > 16:
        bound = rounding_bound(W.view(matrices), R, A, B)
    else:
        # A master may be that of a weight whose rounding was not kept.
        is_kept = w.lost is not None and not w.base.coarse
        kept = w.lost.dtype if is_kept else None
        bound = rounding_bound_in_16_bit(W.view(matrices), R, A, B, kept)
    return bound.view(W.shape).double() + storing_bound(w)


def storing_bound(w: Weight) -> Tensor:
    """Bound what a base takes beyond the rounding of R to the weight's dtype.

    An int8 base takes half a step. It may take a rounding of its largest value more: the scales are
    rounded. A compensation gives it back, up to its own rounding.

    What a quantised base takes is bounded by a master that is, up to its own rounding, this.
    """
    if isinstance(w.base, Dense):
        return torch.zeros((), dtype=torch.float64)
    if not isinstance(w.base, Int8):
        return master_bound(w)
    eps = torch.finfo(w.base.dtype if w.lost is None else w.lost.dtype).eps
    steps = w.base.scales.double().expand(w.shape)
    tiny = torch.finfo(w.base.dtype).smallest_normal
    if w.lost is None:
        return steps * (0.5 + 130 * eps) + tiny
    return steps * 4 * eps + tiny * eps


def master_bound(w: Weight) -> Tensor:
    """Bound the rounding of a master: half a unit of what was taken, or half a subnormal step.

    That of W to a number of its dtype moves by as much once more.
    """
    assert w.lost is not None
    if not w.lost.numel():  # nothing was taken
        return torch.zeros((), dtype=torch.float64)
    info = torch.finfo(w.lost.dtype)
    return w.lost.double().abs() * info.eps + info.smallest_normal * info.eps


def rounding_bound(W: Tensor, R: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Bound |join(split(W)) - W| where both are sums of r + 1 terms in any order.

    Each is off by g = (r+1) u / (1 - (r+1) u) times the sum of its terms' magnitudes (Higham,
    "Accuracy and Stability", 3.1): |W| + |A||B| for the split, |R| + |A||B| for the join.
    """
    terms = (A.shape[-1] + 1) * torch.finfo(W.dtype).eps / 2
    return terms / (1 - terms) * (W.abs() + R.abs() + 2 * (A.abs() @ B.abs())) * (1 + 1e-6)


def rounding_bound_in_16_bit(
    W: Tensor, R: Tensor, A: Tensor, B: Tensor, kept: torch.dtype | None
) -> Tensor:
    """Bound |merge - W| for 16-bit weights whose lost bits are kept in some dtype, or not.

    R is off by half a unit in its last place, or, where the lost bits are kept, the compensation
    that holds them is: it has as many bits as R has, or eight. The float32 sums of at most 9 + 1
    terms are off by a few of their units.
    """
    u, u32 = torch.finfo(W.dtype).eps / 2, 2**-24
    lost = u if kept is None else u * 2**-8 if kept == torch.int8 else u * u
    size = R.abs().double() + W.abs().double() + (A.double().abs() @ B.double().abs())
    tiny = torch.finfo(W.dtype).smallest_normal * u  # half a subnormal step
    off = 1.01 * lost * size + 8 * u32 * size + 2 * tiny
    # W is a number of its dtype, so rounding to the nearest moves by `off` once more at most.
    return 2 * off
