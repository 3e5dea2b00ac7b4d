"""How far rounding may take a merge from the weight, derived for each kind of dtype."""

import torch
from torch import Tensor


def rounding_bound(W: Tensor, R: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Bound |join(split(W)) - W| where both are sums of r + 1 terms in any order.

    Each is off by g = (r+1) u / (1 - (r+1) u) times the sum of its terms' magnitudes (Higham,
    "Accuracy and Stability", 3.1): |W| + |A||B| for the split, |R| + |A||B| for the join.
    """
    terms = (A.shape[1] + 1) * torch.finfo(W.dtype).eps / 2
    return terms / (1 - terms) * (W.abs() + R.abs() + 2 * (A.abs() @ B.abs())) * (1 + 1e-6)


def rounding_bound_in_16_bit(W: Tensor, R: Tensor, A: Tensor, B: Tensor, kept: bool) -> Tensor:
    """Bound |merge - W| for 16-bit weights whose lost bits are kept in the same dtype, or not.

    R is off by half a unit in its last place, or, where the lost bits are kept, the compensation
    that holds them is. The float32 sums of at most 9 + 1 terms are off by a few of their units.
    """
    u, u32 = torch.finfo(W.dtype).eps / 2, 2**-24
    lost = u * u if kept else u
    size = R.abs().double() + W.abs().double() + (A.double().abs() @ B.double().abs())
    tiny = torch.finfo(W.dtype).smallest_normal * u  # half a subnormal step
    off = 1.01 * lost * size + 8 * u32 * size + 2 * tiny
    # W is a number of its dtype, so rounding to the nearest moves by `off` once more at most.
    return 2 * off
