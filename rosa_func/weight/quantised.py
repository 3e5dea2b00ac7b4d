"""Quantised bases: a frozen residual in 4 or 8 bits a value, in blocks of 64 with a scale each.

A base is made of plain tensors. `like` has the shape of the weight behind a dimension of 0, and its
dtype: it takes no memory, and is moved, cast, stacked and saved with the rest. Codes and scales are
those of the flattened matrix, in a batch of matrices those of each. A convolution's weight counts
as one matrix.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rosa_func.weight import blocks


class Nf4(NamedTuple):
    """R in the 16 levels of a normal variable: 4 bits a value, and a float32 a block."""

    nf4: Tensor
    scales: Tensor
    like: Tensor

    @classmethod
    def of(cls, W: Tensor, batch: bool) -> "Nf4":
        """Return an empty base, as which a weight of W's shape and dtype is to be stored."""
        return cls(_nothing(W, batch, torch.uint8), _nothing(W, batch, torch.float32), _like(W))

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight."""
        return _shape(self.like)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight."""
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weight."""
        return self.nf4.device

    @property
    def coarse(self) -> bool:
        """It takes a tenth of R."""
        return True

    @property
    def apply(self) -> None:
        """It is made dense."""

    def dense(self) -> Tensor:
        """Return R, computed in float32 and rounded to the weight's dtype."""
        return _weight(blocks.from_nf4(self.nf4, self.scales), self.like)

    def store(self, R: Tensor) -> "tuple[Nf4, Tensor]":
        """Round each value to the nearest level of its block."""
        codes, scales = blocks.to_nf4(blocks.in_blocks(R, self.nf4.shape[:-1]))
        stored = Nf4(codes, scales, self.like)
        return stored, R - stored.dense().to(R.dtype)

    def rows(self, indices: Tensor) -> Tensor:
        """Return R[indices], and form no other rows where a row is whole blocks."""
        return _rows(blocks.from_nf4, self.nf4, self.scales, self.like, indices)

    def select(self, index: Any) -> "Nf4":
        """Return the base of R[index]."""
        return Nf4(self.nf4[index], self.scales[index], self.like[:, index])


class Nf4Double(NamedTuple):
    """As `Nf4`, the scales quantised again: 8 bits a block, and a float32 for 256 of them."""

    nf4: Tensor
    scales: Tensor
    nested_scales: Tensor
    offset: Tensor
    like: Tensor

    @classmethod
    def of(cls, W: Tensor, batch: bool) -> "Nf4Double":
        """Return an empty base, as which a weight of W's shape and dtype is to be stored."""
        codes, scales = _nothing(W, batch, torch.uint8), _nothing(W, batch, torch.float32)
        return cls(codes, codes, scales, scales, _like(W))

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight."""
        return _shape(self.like)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight."""
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weight."""
        return self.nf4.device

    @property
    def coarse(self) -> bool:
        """It takes a tenth of R."""
        return True

    @property
    def apply(self) -> None:
        """It is made dense."""

    def dense(self) -> Tensor:
        """Return R, computed in float32 and rounded to the weight's dtype."""
        scales = blocks.from_nested(self.scales, self.nested_scales, self.offset)
        return _weight(blocks.from_nf4(self.nf4, scales), self.like)

    def store(self, R: Tensor) -> "tuple[Nf4Double, Tensor]":
        """Round each value to the nearest level of its block, then the scales."""
        codes, scales = blocks.to_nf4(blocks.in_blocks(R, self.nf4.shape[:-1]))
        stored = Nf4Double(codes, *blocks.to_nested(scales), self.like)
        return stored, R - stored.dense().to(R.dtype)

    def rows(self, indices: Tensor) -> Tensor:
        """Return R[indices], and form no other rows where a row is whole blocks."""
        scales = blocks.from_nested(self.scales, self.nested_scales, self.offset)
        return _rows(blocks.from_nf4, self.nf4, scales, self.like, indices)

    def select(self, index: Any) -> "Nf4Double":
        """Return the base of R[index]."""
        codes, scales, nested, offset = (field[index] for field in self[:-1])
        return Nf4Double(codes, scales, nested, offset, self.like[:, index])


class Int8(NamedTuple):
    """R in 255 equal steps: 8 bits a value, and a float32 a block."""

    int8: Tensor
    scales: Tensor
    like: Tensor

    @classmethod
    def of(cls, W: Tensor, batch: bool) -> "Int8":
        """Return an empty base, as which a weight of W's shape and dtype is to be stored."""
        return cls(_nothing(W, batch, torch.int8), _nothing(W, batch, torch.float32), _like(W))

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight."""
        return _shape(self.like)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight."""
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weight."""
        return self.int8.device

    @property
    def coarse(self) -> bool:
        """It takes half a hundredth of R."""
        return True

    @property
    def apply(self) -> None:
        """It is made dense."""

    def dense(self) -> Tensor:
        """Return R, computed in float32 and rounded to the weight's dtype."""
        return _weight(blocks.from_int8(self.int8, self.scales), self.like)

    def store(self, R: Tensor) -> "tuple[Int8, Tensor]":
        """Round each value to the nearest step of its block."""
        codes, scales = blocks.to_int8(blocks.in_blocks(R, self.int8.shape[:-1]))
        stored = Int8(codes, scales, self.like)
        return stored, R - stored.dense().to(R.dtype)

    def rows(self, indices: Tensor) -> Tensor:
        """Return R[indices], and form no other rows where a row is whole blocks."""
        return _rows(blocks.from_int8, self.int8, self.scales, self.like, indices)

    def select(self, index: Any) -> "Int8":
        """Return the base of R[index]."""
        return Int8(self.int8[index], self.scales[index], self.like[:, index])


QUANTISED: dict[str, type[Nf4 | Nf4Double | Int8]] = {
    "nf4": Nf4,
    "nf4_double": Nf4Double,
    "int8": Int8,
}


def _nothing(W: Tensor, batch: bool, dtype: torch.dtype) -> Tensor:
    """Return no codes or scales, of the matrices that have blocks of their own."""
    return W.new_empty((*(W.shape[:-2] if batch else ()), 0), dtype=dtype)


def _like(W: Tensor) -> Tensor:
    return W.new_empty((0, *W.shape))


def _shape(like: Tensor) -> torch.Size:
    """Return the shape of the weight; of stacked ones, the 0 is not the first dimension."""
    return torch.Size([size for size in like.shape if size])


def _weight(values: Tensor, like: Tensor) -> Tensor:
    """Return the weight that these blocks are."""
    return blocks.from_blocks(values, _shape(like), like.dtype)


def _rows(
    form: Callable[[Tensor, Tensor], Tensor],
    codes: Tensor,
    scales: Tensor,
    like: Tensor,
    indices: Tensor,
) -> Tensor:
    m, n = _shape(like)
    if n % blocks.BLOCK:
        return F.embedding(indices, _weight(form(codes, scales), like))
    chosen = [
        field.view(m, -1).index_select(0, indices.flatten().long()) for field in (codes, scales)
    ]
    rows = form(chosen[0].flatten(), chosen[1].flatten())
    return rows.to(like.dtype).view(*indices.shape, n)
