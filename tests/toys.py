"""Toy bases and terms, to show that the library needs to know nothing of a kind of part."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from rosa_func.weight import layout
from rosa_func.weight.rounding import factor_dtype


class Int8(NamedTuple):
    """A residual of one byte a value and a scale for each row: R = codes * scales."""

    codes: Tensor
    scales: Tensor

    apply = rows = None
    coarse = False  # so a merge has what it took in it, where that is kept

    @classmethod
    def like(cls, W: Tensor) -> "Int8":
        """Return an empty base, whose `store` makes those of weights of W's dtype."""
        return cls(W.new_empty(0, dtype=torch.int8), W.new_empty(0))

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.scales.dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def dense(self) -> Tensor:
        return self.codes.to(self.dtype) * self.scales

    def store(self, R: Tensor) -> "tuple[Int8, Tensor]":
        scales = (R.abs().amax(-1, keepdim=True) / 127).to(self.dtype)
        steps = R / torch.where(scales > 0, scales, 1).to(R.dtype)
        stored = Int8(steps.round().clamp(-127, 127).to(torch.int8), scales)
        return stored, R - stored.dense().to(R.dtype)

    def select(self, index: Any) -> "Int8":
        return Int8(self.codes[index], self.scales[index])


class Scale(NamedTuple):
    """A factor for each row, which is no sum: W -> diag(scale) W."""

    scale: Tensor

    fixed = frozenset[str]()
    ndim = product = apply = apply_ = through = pull = rows = convolve = grouped = None

    @classmethod
    def at_start(cls, W: Tensor, batch: bool) -> "Scale":
        return cls(torch.ones(W.shape[: -1 if batch else 1], dtype=factor_dtype(W.dtype)))

    def check(self, shape: torch.Size) -> str | None:
        rows = self.scale.shape
        return None if shape[: len(rows)] == rows else f"the scale has shape {tuple(rows)}, not of"

    def fold(self, W: Tensor) -> Tensor:
        rows = self.scale.reshape(*self.scale.shape, *(1,) * (W.ndim - self.scale.ndim))
        return W * rows.to(W.dtype)

    def restarted(self) -> "Scale":
        return Scale(torch.ones_like(self.scale))

    def select(self, index: Any) -> "Scale":
        return Scale(self.scale[index])


@contextmanager
def registered() -> Iterator[None]:
    """Let the library know the toys inside a `with` block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "BASES", [*layout.BASES, Int8])
        patch.setattr(layout, "TERMS", [*layout.TERMS, Scale])
        yield
