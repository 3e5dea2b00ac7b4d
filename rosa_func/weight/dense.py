"""The dense base: a residual in the weight's own dtype."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Dense(NamedTuple):
    """A residual R, of the weight's shape and dtype: a tensor of its own in `frozen`."""

    R: Tensor

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight."""
        return self.R.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight."""
        return self.R.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weight."""
        return self.R.device

    @property
    def coarse(self) -> bool:
        """It rounds to the weight's dtype, and takes no more."""
        return False

    @property
    def rows(self) -> None:
        """They are those of R."""

    def dense(self) -> Tensor:
        """Return R."""
        return self.R

    def store(self, R: Tensor) -> "tuple[Dense, Tensor | None]":
        """Round R to the dtype of this one."""
        stored = R.to(self.R.dtype)
        return Dense(stored), None if stored.dtype == R.dtype else R - stored

    def apply(self, x: Tensor, flipped: bool, bias: Tensor | None) -> Tensor:
        """Return x R + bias, or x R^T + bias, for rows x or a batch of them."""
        if self.R.ndim > 2:
            out = x @ (self.R.mT if flipped else self.R)
            return out if bias is None else out + bias
        if flipped:
            return F.linear(x, self.R, bias)
        return x @ self.R if bias is None else torch.addmm(bias, x, self.R)

    def select(self, index: Any) -> "Dense":
        """Return the base of R[index]."""
        return Dense(self.R[index])
