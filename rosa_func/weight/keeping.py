"""What storing a residual takes, and how it is kept."""

from typing import NamedTuple

import torch
from torch import Tensor


class Kept(NamedTuple):
    """How a compensation is kept.

    Attributes:
        dtype: of it.
    """

    dtype: torch.dtype


def kept_as(lost: Tensor | None) -> Kept | None:
    """Return how a compensation is kept, so that the next one is kept alike."""
    return None if lost is None else Kept(lost.dtype)
