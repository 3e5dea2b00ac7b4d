"""Values in blocks of 64 with a scale each: codes of 4 or 8 bits, and back.

    value = scale * level[code],    scale the largest magnitude of the block (times a constant)

Codes and scales are those of bitsandbytes, bit for bit. Leading dimensions are those of a batch of
matrices, each of which is flattened to blocks of its own; the last block is filled up with zeros.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rosa_func._torch import is_eager, is_fake, outside_transforms

BLOCK = 64
_NESTED_BLOCK = 256  # of scales, where these are quantised again
_TINY = 1e-38  # a smaller scale has no reciprocal in float32
_HOST = torch.device("cpu")  # whatever the default device is

Table = dict[torch.device, Tensor]  # the same numbers on each device that has asked for them

# The 16 levels of a normal variable (Dettmers et al. 2023, "QLoRA", appendix E).
_LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    device=_HOST,
)
_EDGES: Table = {_HOST: (_LEVELS[1:] + _LEVELS[:-1]) / 2}
_PAIRS: Table = {  # by their byte
    _HOST: torch.stack([_LEVELS.repeat_interleave(16), _LEVELS.repeat(16)], 1)
}


def _dynamic_levels() -> Tensor:
    """Return 256 levels in [-1, 1]: seven decades, each with twice as many as the one below it.

    Within a decade they are the middles of equal steps from 0.1 to 1. There is a 0, and a 1 that
    has no negative (Dettmers 2015, "8-Bit Approximations for Parallelism in Deep Learning").
    """
    positive = []
    for decade in range(7):
        steps = torch.linspace(0.1, 1, 2**decade + 1, device=_HOST)
        positive.append(10.0 ** (decade - 6) * ((steps[:-1] + steps[1:]) / 2))
    magnitudes = torch.cat(positive)
    ends = torch.tensor([0.0, 1.0], device=_HOST)
    return torch.cat([magnitudes, -magnitudes, ends]).sort().values


_DYNAMIC: Table = {_HOST: _dynamic_levels()}
_DYNAMIC_EDGES: Table = {_HOST: (_DYNAMIC[_HOST][1:] + _DYNAMIC[_HOST][:-1]) / 2}


def in_blocks(R: Tensor, lead: torch.Size) -> Tensor:
    """Return a weight as float32 blocks: lead x blocks x 64."""
    return _in_blocks(R.reshape(*lead, -1).float(), BLOCK)


def from_blocks(blocks: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return the weight of that shape; `in_blocks` reversed."""
    flat = blocks.flatten(-2).to(dtype)
    size = shape.numel() // max(1, flat.shape[:-1].numel())
    return flat[..., :size].reshape(shape)


def to_nf4(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return 4-bit codes, two a byte with the first in the upper half, and scales."""
    scales = blocks.abs().amax(-1)
    levels = _nearest(_over(blocks, scales), _EDGES).flatten(-2)
    return (levels[..., ::2] << 4) | levels[..., 1::2], scales


def from_nf4(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the blocks."""
    table, flat = _on(codes.device, _PAIRS), codes.flatten()
    if is_eager():  # a pair is moved as one word: three times as quick
        words = table.view(torch.int64).view(-1).index_select(0, flat.int())
        values = words.view(torch.float32)
    else:  # vmap before torch 2.11 does neither know such views nor indices of 32 bits
        values = table.index_select(0, flat.long())
    return values.view(*scales.shape, BLOCK).mul_(scales.unsqueeze(-1))


def to_int8(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes from -127 to 127, and the steps between two of them."""
    scales = blocks.abs().amax(-1) / 127
    steps = blocks / torch.where(scales > 0, scales, 1).unsqueeze(-1)
    return steps.round_().clamp_(-127, 127).to(torch.int8).flatten(-2), scales


def from_int8(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the blocks."""
    return codes.view(*scales.shape, BLOCK) * scales.unsqueeze(-1)


def to_nested(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scales as 8-bit codes, the scales of blocks of 256 of them, and their mean."""
    offset = scales.mean(-1, keepdim=True)
    blocks = _in_blocks(scales - offset, _NESTED_BLOCK)
    nested = blocks.abs().amax(-1)
    codes = _nearest(_over(blocks, nested), _DYNAMIC_EDGES).flatten(-2)
    return codes[..., : scales.shape[-1]].contiguous(), nested, offset


def from_nested(codes: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
    """Return the scales."""
    levels = _on(codes.device, _DYNAMIC).index_select(0, codes.flatten().long()).view(codes.shape)
    blocks = _in_blocks(levels, _NESTED_BLOCK) * nested.unsqueeze(-1)
    return blocks.flatten(-2)[..., : codes.shape[-1]] + offset


def _in_blocks(flat: Tensor, size: int) -> Tensor:
    """Fill the last block up with zeros."""
    filled = F.pad(flat, (0, -flat.shape[-1] % size))
    return filled.view(*flat.shape[:-1], -1, size)


def _over(blocks: Tensor, scales: Tensor) -> Tensor:
    return blocks * (1 / scales.clamp_min(_TINY)).unsqueeze(-1)


def _nearest(values: Tensor, edges: Table) -> Tensor:
    """Return the places of the nearest levels, the lower one at an edge."""
    return torch.bucketize(values, _on(values.device, edges), out_int32=True).to(torch.uint8)


def _on(device: torch.device, table: Table) -> Tensor:
    """Return a table on a device. It is copied there once: a copy waits for the device."""
    if device not in table:
        if torch.compiler.is_compiling() or is_fake():  # whose tensors are not to be kept
            return table[_HOST].to(device)
        with outside_transforms(), torch.inference_mode(False):
            table[device] = table[_HOST].to(device)
    return table[device]
