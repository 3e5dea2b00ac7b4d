"""The past term: products that were trained, and go on frozen, W + P.

It is for a base that cannot take them in: one that loses more than rounding does, without a master.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rosa_func.weight.low_rank import LowRank
from rosa_func.weight.parts import Weight, mapped, trainable


class Past(NamedTuple):
    """The factors of all draws before the last, side by side: P = A_1 B_1 + A_2 B_2 + ..."""

    past_A: Tensor
    past_B: Tensor

    @property
    def fixed(self) -> frozenset[str]:
        """Nothing of it trains."""
        return frozenset(self._fields)

    @property
    def restarted(self) -> None:
        """What merges it leaves it out."""

    @property
    def through(self) -> None:
        """The factors are applied."""

    @property
    def ndim(self) -> int:
        """The dimensions of a factor."""
        return self.past_A.ndim

    def check(self, shape: torch.Size) -> str | None:
        """Say so if the factors do not multiply to a weight of that shape."""
        wrong = LowRank(*self).check(shape)
        return wrong and wrong.replace("factors", "past factors")

    def product(self, shape: torch.Size) -> Tensor:
        """Return P in the shape of the weight."""
        return LowRank(*self).product(shape)

    def fold(self, W: Tensor) -> Tensor:
        """Return W + P, in the dtype of W."""
        return LowRank(*self).fold(W)

    def apply(self, x: Tensor, flipped: bool, out: Tensor) -> Tensor:
        """Return out + x P."""
        return LowRank(*self).apply(x, flipped, out)

    def apply_(self, x: Tensor, flipped: bool, out: Tensor) -> None:
        """Add x P to out, in place; nothing of it is needed again."""
        LowRank(*self).apply_(x, flipped, out)

    def pull(
        self,
        x: Tensor,
        d: Tensor,
        kept: Tensor | None,
        flipped: bool,
        d_x: Tensor | None,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        """Add the term's share to the gradient of x, in place."""
        if d_x is not None:
            self.apply_(d, not flipped, d_x)
        return None, None

    def rows(self, embedding: Callable[..., Tensor], indices: Tensor, shape: torch.Size) -> Tensor:
        """Return rows of P."""
        return LowRank(*self).rows(embedding, indices, shape)

    def convolve(
        self, convolution: Callable[..., Tensor], x: Tensor, shape: torch.Size, *options: Any
    ) -> Tensor:
        """Convolve with P."""
        return LowRank(*self).convolve(convolution, x, shape, *options)

    def grouped(self, product: Callable[..., Tensor], x: Tensor, flipped: bool) -> Tensor:
        """Return x P, each group of rows with factors of its own."""
        return LowRank(*self).grouped(product, x, flipped)

    def select(self, index: Any) -> "Past":
        """Return the factors of the matrices W[index]."""
        return Past(self.past_A[index], self.past_B[index])


def with_past(w: Weight, factors: LowRank) -> Weight:
    """Return the weight with other factors, and those that it had among its past ones.

    The values of the other terms are copied, for the new ones to train.
    """
    terms: list[Any] = []
    past: Past | None = None
    old = factors
    for term in w.terms:
        if isinstance(term, Past):
            past = term
        elif isinstance(term, LowRank):
            old = term
        else:
            own = trainable(term)
            terms.append(mapped(term, lambda value: value.detach().clone(), own))
    A, B = (factor.detach() for factor in old)
    if A.any() and B.any():  # else nothing was trained
        earlier = [past] if past else []
        past = Past(
            torch.cat([*(p.past_A for p in earlier), A], -1),
            torch.cat([*(p.past_B for p in earlier), B], -2),
        )
    return w._replace(terms=(factors, *([past] if past else []), *terms))
