"""Whether predictions are as sure as they are right.

Source: Guo et al. 2017, "On calibration of modern neural networks".
"""

from pathlib import Path
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from examples.shared.panels import panels, save

BINS = 10


class Calibration(NamedTuple):
    """How sure predictions were, and how often they were right, on average in each bin."""

    sure: Tensor
    right: Tensor
    share: Tensor  # of all rows

    def error(self) -> float:
        """Return the expected calibration error."""
        return float((self.share * (self.sure - self.right).abs()).sum())


def calibration(p: Tensor, y: Tensor) -> Calibration:
    """Put predictions into bins by how sure they are."""
    sure, guess = p.max(-1)
    bins = F.one_hot((sure * BINS).long().clamp(max=BINS - 1), BINS).to(p.dtype)
    counts = bins.sum(0)
    each = counts.clamp(min=1)
    right = (guess == y).to(p.dtype)
    return Calibration(sure @ bins / each, right @ bins / each, counts / len(y))


def plot(found: dict[str, Calibration], path: Path) -> None:
    """Draw how often predictions were right over how sure they were."""
    figure, (panel,) = panels(1, width=4.8, height=4.4)
    panel.plot([0.25, 1], [0.25, 1], color="gray", lw=1, ls=":", label="calibrated")
    for (name, c), marker in zip(found.items(), "osv", strict=False):
        filled = c.share > 0.005
        panel.plot(c.sure[filled], c.right[filled], marker=marker, ms=4, label=name)
    panel.set(xlabel="how sure it was", ylabel="how often it was right")
    panel.legend(fontsize="small")
    save(figure, path, "The last state is too sure; snapshots and Laplace are less so")
