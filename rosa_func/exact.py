"""The arithmetic of a split, W -> R, c, and of its reversal, R, c, A, B -> W."""

import torch
from torch import Tensor

_SIXTEEN_BIT = (torch.float16, torch.bfloat16)
SUPPORTED = (*_SIXTEEN_BIT, torch.float32, torch.float64)


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the factors of a weight: float32 for a 16-bit one, else its own."""
    return torch.float32 if dtype in _SIXTEEN_BIT else dtype


def compensation_dtype(dtype: torch.dtype, exact: bool | None) -> torch.dtype | None:
    """Return the dtype in which the rounding error of a residual is kept, None for not at all.

    For a 16-bit weight the error has the bits of R rounded away *and* those of W below P's last
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
    W: Tensor,
    A: Tensor,
    B: Tensor,
    dtype: torch.dtype,
    kept: torch.dtype | None,
    own: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return R = W - A B rounded to `dtype`, and what the rounding took, in the dtype `kept`.

    W is m x n, in `dtype` or in the wider one in which `join` returns it. If `own`, R may be
    written over W: fresh pages cost as much as the arithmetic. A and B come from `aligned`.
    """
    if not (A.any() and B.any()):  # nothing is subtracted: R is W, its storage too
        R = W.to(dtype)
        return R, None if kept is None else (W - R).to(kept)
    if kept is None and dtype == A.dtype:
        return torch.addmm(W, A, B, alpha=-1, out=W if own else None), None
    wide = A.dtype if kept is None else torch.promote_types(A.dtype, kept)
    s, e = two_sum(W.to(wide), -(A @ B).to(wide))
    R = s.to(dtype)
    return R, None if kept is None else ((s - R) + e).to(kept)


def join(R: Tensor, A: Tensor, B: Tensor, c: Tensor | None) -> Tensor:
    """Return W = R + c + A B, unrounded: in float64 or float32 where R has 16 bits.

    R + A B = h + l exactly. Where the two cancel, l = 0 and h + c is rounded once; elsewhere
    l + c is at most a unit in the last place of R and its own rounding error is a square of that,
    so a W that is a number of R's dtype comes back bit for bit.
    """
    A, B = aligned(A), aligned(B)
    if c is None and R.dtype == A.dtype:
        return torch.addmm(R, A, B)
    wide = A.dtype if c is None else torch.promote_types(A.dtype, c.dtype)
    P = (A @ B).to(wide)
    if c is None:
        return R.to(wide) + P
    h, l = two_sum(R.to(wide), P)
    return h + (l + c.to(device=h.device, dtype=wide))


def aligned(factor: Tensor) -> Tensor:
    """Copy a factor into fresh memory: the bits of a BLAS product depend on strides and alignment.

    A @ B is formed when W is split and again when it is joined, and must be the same both times.
    """
    return factor.clone(memory_format=torch.contiguous_format)
