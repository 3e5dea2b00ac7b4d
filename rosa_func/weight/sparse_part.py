"""The sparse term: W + S, with S on a fixed support."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rosa_func._torch import is_autocast, is_eager, without_autocast
from rosa_func.weight import sampled
from rosa_func.weight.low_rank import low_rank
from rosa_func.weight.parts import Weight
from rosa_func.weight.rounding import factor_dtype


class SparsePart(NamedTuple):
    """Values at k places that stay; in a batch of matrices, at k places of each.

    A place counts along the flat matrix: i n + j for row i and column j. Those of a matrix rise.
    A weight of more than two dimensions that is no batch counts as m x (the rest).
    """

    values: Tensor
    support: Tensor

    @property
    def fixed(self) -> frozenset[str]:
        """The support stays."""
        return frozenset({"support"})

    @property
    def ndim(self) -> int:
        """Two for matrices, and those of a batch more."""
        return self.values.ndim + 1

    @property
    def apply(self) -> None:
        """It is folded in: a sparse product beside the dense one takes longer."""

    @property
    def apply_(self) -> None:
        """As `apply`."""

    @property
    def convolve(self) -> None:
        """It is folded in."""

    @property
    def grouped(self) -> None:
        """It is folded in."""

    def check(self, shape: torch.Size) -> str | None:
        """Say so if there are not as many values as places, or as many rows of them as matrices."""
        values, places = self.values.shape, self.support.shape
        lead = values[:-1]
        if values == places and len(lead) < len(shape) - 1 and shape[: len(lead)] == lead:
            return None
        return f"{tuple(values)} sparse values at {tuple(places)} places do not fit"

    def product(self, shape: torch.Size) -> Tensor:
        """Return S."""
        return self.fold(self.values.new_zeros(shape))

    def fold(self, W: Tensor) -> Tensor:
        """Return W + S, in the dtype of W."""
        if self.values.ndim == 1:
            return sampled.folded(W, self.values, self.support)
        flat = W.flatten(self.values.ndim - 1)
        return flat.scatter_add(-1, self.support.long(), self.values.to(W.dtype)).view(W.shape)

    def restarted(self) -> "SparsePart":
        """Return zeros on the same support."""
        return self._replace(values=torch.zeros_like(self.values))

    def through(self, x: Tensor, R: Tensor, flipped: bool) -> Tensor:
        """Return x (R + S), or x (R + S)^T."""
        values = self.values
        if is_autocast(x.device) and R.dtype != torch.float64:  # which autocast leaves alone
            dtype = torch.get_autocast_dtype(x.device.type)
            x, R, values = x.to(dtype), R.to(dtype), values.to(dtype)
        with without_autocast(x.device):
            return sampled.product(x, R, values, self.support, flipped)

    def pull(
        self,
        x: Tensor,
        d: Tensor,
        kept: Tensor | None,
        flipped: bool,
        d_x: Tensor | None,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        """Return the gradient of the values; that of x is the folded weight's."""
        if not needs[0]:
            return None, None
        left, right = (d, x) if flipped else (x, d)
        return sampled.entries(left, right, self.support), None

    def rows(self, embedding: Callable[..., Tensor], indices: Tensor, shape: torch.Size) -> Tensor:
        """Return rows of S, which are gathered from the values; on a GPU, from the whole of S."""
        if not is_eager():
            raise NotImplementedError  # how many values they have is not known before
        if self.support.device.type != "cpu":  # to ask how many would wait for the device
            return embedding(indices, self.product(shape))
        n = shape[1]
        flat = indices.flatten()
        rows = flat.to(self.support.dtype)
        first = torch.searchsorted(self.support, rows * n)
        counts = torch.searchsorted(self.support, rows * n + n) - first
        row = torch.arange(len(flat), device=flat.device).repeat_interleave(counts)
        before = counts.cumsum(0) - counts
        place = torch.arange(len(row), device=flat.device) + (first - before)[row]
        where = row * n + self.support[place] % n
        zeros = self.values.new_zeros(len(flat) * n)
        return zeros.index_add(0, where, self.values[place]).view(*indices.shape, n)

    def select(self, index: Any) -> "SparsePart":
        """Return the values of the matrices W[index]."""
        return SparsePart(self.values[index], self.support[index])


def sparse_part(w: Weight) -> SparsePart | None:
    """Return the sparse term of a weight, None if it has none."""
    for term in w.terms:
        if isinstance(term, SparsePart):
            return term
    return None


def with_zeros(w: Weight, support: Tensor) -> Weight:
    """Return the weight with a sparse part that is zero, which trains if the factors do."""
    support = support.to(w.base.device)
    values = torch.zeros(
        support.shape, dtype=factor_dtype(w.base.dtype), device=w.base.device
    ).requires_grad_(any(leaf.requires_grad for leaf in low_rank(w)))
    return w._replace(terms=(*w.terms, SparsePart(values, support)))


def sparse_parts(weights: Mapping[str, Weight]) -> dict[str, SparsePart]:
    """Return the sparse terms of the weights that have one."""
    found = {name: sparse_part(w) for name, w in weights.items()}
    return {name: part for name, part in found.items() if part is not None}
