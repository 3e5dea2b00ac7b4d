"""A float32 number as 16 bits and the next eight.

    h = R + c / 256 |R' - R|,    R' the next number after R: away from 0 if c > 0, else towards it

A bfloat16 is the upper half of a float32. So R and c are the upper 16 and the next 8 bits of h, as
an integer, rounded to 24 bits. A float16 has three bits of the exponent less, and three of the
mantissa more: scaled by 2**-112 its exponents are those of float32, those of subnormals too.
Rounding to 24 bits takes 2**-16 of a value at most, and with float16 2**-19.
"""

import torch
from torch import Tensor

CODES = torch.int8  # the dtype of c

_BLOCK = 2**17  # values: all passes over a block find it in the cache
# By dtype: how it is scaled, and how many bits of a float32 are below the codes.
_FORMATS = {torch.bfloat16: (1.0, 8), torch.float16: (2.0**-112, 5)}


def encoded(h: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return R, in a dtype of 16 bits, and the codes c, of a float32 tensor.

    R is h to the nearest, but for those that are within 2**-9 of a step from the middle. Values
    beyond the largest number give infinities.
    """
    scale, below = _FORMATS[dtype]
    R = torch.empty(h.shape, dtype=dtype, device=h.device)
    codes = torch.empty(h.shape, dtype=CODES, device=h.device)
    for whole, high, low in _blocks(h.reshape(-1), R.view(-1), codes.view(-1)):
        scaled = whole if scale == 1 else whole * scale
        bits = scaled.view(torch.int32) + 2 ** (below - 1)
        low.copy_(bits >> below)  # which drops what is above 8 bits
        bits.add_(2 ** (below + 7)).bitwise_and_(-(2 ** (below + 8)))
        value = bits.view(torch.float32)
        high.copy_(value if scale == 1 else value.div_(scale))
    return R, codes


def decoded(R: Tensor, codes: Tensor) -> Tensor:
    """Return h; `encoded` gives the same R and codes of it."""
    scale, below = _FORMATS[R.dtype]
    h = torch.empty(R.shape, dtype=torch.float32, device=R.device)
    for whole, high, low in _blocks(h.view(-1), R.reshape(-1), codes.reshape(-1)):
        whole.copy_(high)
        if scale != 1:
            whole.mul_(scale)
        whole.view(torch.int32).add_(low, alpha=2**below)
        if scale != 1:
            whole.div_(scale)
    return h


def _blocks(*flat: Tensor) -> "zip[tuple[Tensor, ...]]":
    """Return the blocks of flat tensors of one length, on a GPU a single one."""
    size = _BLOCK if flat[0].device.type == "cpu" else max(1, len(flat[0]))
    return zip(*(tensor.split(size) for tensor in flat), strict=True)  # type: ignore[no-untyped-call]
