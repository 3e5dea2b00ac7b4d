"""What storing a residual takes, and how it is kept."""

import os
from typing import NamedTuple

import torch
from torch import Tensor

Place = str | os.PathLike[str] | None  # None: beside the weight; "cpu"; or a folder


class Kept(NamedTuple):
    """How a compensation is kept.

    Attributes:
        dtype: of it.
        place: None for beside the weight, "cpu" for the host, or a folder.
    """

    dtype: torch.dtype
    place: Place = None


def kept_as(lost: Tensor | None) -> Kept | None:
    """Return how a compensation is kept, so that the next one is kept alike."""
    return None if lost is None else Kept(lost.dtype)
