"""The low-rank term: W + A B."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rosa_func.weight.parts import Weight


class LowRank(NamedTuple):
    """A product of two factors, A: m x r and B: r x n, or a batch of such products.

    A weight of more than two dimensions counts as m x (the rest) where the factors are matrices,
    as in a convolution, and as a batch of matrices where they have its leading dimensions.
    """

    A: Tensor
    B: Tensor

    @property
    def fixed(self) -> frozenset[str]:
        """Both factors train."""
        return frozenset()

    @property
    def restarted(self) -> None:
        """A sampler draws the factors."""

    @property
    def through(self) -> None:
        """The factors are applied."""

    @property
    def r(self) -> int:
        """The rank."""
        return self.A.shape[-1]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The shape m, n of one product."""
        return self.A.shape[-2], self.B.shape[-1]

    @property
    def ndim(self) -> int:
        """The dimensions of a factor."""
        return self.A.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the product, or of the batch of products."""
        return (*self.A.shape[:-2], *self.matrix_shape)

    def check(self, shape: torch.Size) -> str | None:
        """Say so if the factors do not multiply to a weight of that shape."""
        A, B = self.A.shape, self.B.shape
        if len(A) == 2 and A[1] == B[0] and (A[0], B[1]) == shape:
            return None  # the usual case
        rest = math.prod(shape[len(A) - 1 :])
        fits = len(A) == len(B) <= len(shape) and A[-1] == B[-2] and A[:-2] == B[:-2]
        if fits and (*A[:-1], B[-1]) == (*shape[: len(A) - 1], rest):
            return None
        return f"the factors have shapes {tuple(A)} and {tuple(B)}, which do not multiply to"

    def product(self, shape: torch.Size) -> Tensor:
        """Return A B in the shape of the weight."""
        return (self.A @ self.B).view(shape)

    def fold(self, W: Tensor) -> Tensor:
        """Return W + A B, in the dtype of W."""
        return self._added(W, 1, None)

    def added_to(self, W: Tensor, own: bool) -> Tensor:
        """Return W + A B; written over W if that is the caller's own."""
        return self._added(W, 1, W if own else None)

    def taken_from(self, W: Tensor, own: bool) -> Tensor:
        """Return W - A B; written over W if that is the caller's own."""
        return self._added(W, -1, W if own else None)

    def _added(self, W: Tensor, sign: int, out: Tensor | None) -> Tensor:
        A, B = self.A.to(W.dtype), self.B.to(W.dtype)
        if A.ndim == 2:
            flat = None if out is None else out.flatten(1)
            return torch.addmm(W.flatten(1), A, B, alpha=sign, out=flat).view(W.shape)
        A, B = A.flatten(0, -3), B.flatten(0, -3)
        batch = len(A), A.shape[1], B.shape[2]
        flat = None if out is None else out.view(batch)
        return torch.baddbmm(W.reshape(batch), A, B, alpha=sign, out=flat).view(W.shape)

    def sides(self, flipped: bool) -> tuple[Tensor, Tensor]:
        """Return the two factors of P, or of P^T = B^T A^T."""
        return (self.B.mT, self.A.mT) if flipped else (self.A, self.B)

    def select(self, index: Any) -> "LowRank":
        """Return the factors of the matrices W[index]."""
        return LowRank(self.A[index], self.B[index])

    def apply(self, x: Tensor, flipped: bool, out: Tensor) -> Tensor:
        """Return out + (x A) B."""
        A, B = self.sides(flipped)
        inner = x @ A
        return torch.addmm(out, inner, B) if inner.ndim == 2 else out + inner @ B

    def apply_(self, x: Tensor, flipped: bool, out: Tensor) -> Tensor:
        """Add (x A) B to out, in place, which saves a pass over memory; return x A."""
        if flipped:
            inner = F.linear(x, self.B)
            out.addmm_(inner, self.A.t())
        else:
            inner = x @ self.A
            out.addmm_(inner, self.B)
        return inner

    def pull(
        self,
        x: Tensor,
        d: Tensor,
        inner: Tensor | None,
        flipped: bool,
        d_x: Tensor | None,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of A and B, and add the term's share to that of x, in place.

        d is the gradient of the output, and inner is x A (None: computed again, so that a second
        derivative goes through it).
        """
        A, B = self.sides(flipped)
        needs_A, needs_B = reversed(needs) if flipped else needs
        inner = x @ A if inner is None else inner
        d_inner = d @ B.mT
        if d_x is not None:
            d_x.addmm_(d_inner, A.mT)
        d_A = _left_gradient(x, d_inner) if needs_A else None
        d_B = inner.mT @ d if needs_B else None
        if not flipped:
            return d_A, d_B
        return None if d_B is None else d_B.mT, None if d_A is None else d_A.mT

    def grouped(self, product: Callable[..., Tensor], x: Tensor, flipped: bool) -> Tensor:
        """Return (x A) B, each group of rows with factors of its own.

        Rows of a grouped product have multiples of 16 bytes.
        """
        A, B = self._filled(16 // self.A.itemsize).sides(flipped)
        return product(product(x, A), B)

    def _filled(self, width: int) -> "LowRank":
        """Fill the rank up with zeros to a multiple of a width above 0, which changes nothing."""
        missing = -self.r % width if self.r else width
        return self.padded(self.r + missing)

    def padded(self, r: int) -> "LowRank":
        """Return the same product by factors of rank r, the components that it lacks being zero."""
        missing = r - self.r
        if not missing:
            return self  # the usual case
        return LowRank(F.pad(self.A, (0, missing)), F.pad(self.B, (0, 0, 0, missing)))

    def trimmed(self) -> "LowRank":
        """Return a copy without the last components of which both factors are zero."""
        used = torch.cat([self.A.mT, self.B], -1).any(-1)
        places = used.flatten(0, -2).any(0) if used.ndim > 1 else used
        r = int(places.nonzero().amax()) + 1 if places.any() else 0
        return LowRank(self.A[..., :r].clone(), self.B[..., :r, :].clone())

    def rows(self, embedding: Callable[..., Tensor], indices: Tensor, shape: torch.Size) -> Tensor:
        """Return rows of A B."""
        return embedding(indices, self.A) @ self.B

    def convolve(
        self, convolution: Callable[..., Tensor], x: Tensor, shape: torch.Size, *options: Any
    ) -> Tensor:
        """Convolve with B, whose r outputs A mixes. A convolution has an output at least."""
        A, B = self._filled(1)
        inner = convolution(x, B.view(-1, *shape[1:]), None, *options)
        return convolution(inner, A.view(*A.shape, *(1 for _ in shape[2:])))


def low_rank(w: Weight) -> LowRank:
    """Return the low-rank term of a weight; a ValueError if it has none."""
    for term in w.terms:
        if isinstance(term, LowRank):
            return term
    kinds = ", ".join(type(term).__name__ for term in w.terms)
    raise ValueError(f"a weight of shape {tuple(w.shape)} has no factors A and B, but {kinds}")


def _left_gradient(rows: Tensor, d_inner: Tensor) -> Tensor:
    """Return rows^T d_inner.

    With few columns the transposed product is quicker. Autograd then copies the result into the
    layout of the factor, and even so it is quicker.
    """
    return (d_inner.mT @ rows).mT if d_inner.shape[1] <= 32 else rows.mT @ d_inner
