"""A term that changes nothing, and whose gradient is that of the whole weight."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rosa_func.weight.parts import pulled


class Probe(NamedTuple):
    """Zeros of the weight's shape, or of its matrix: a leaf that takes no memory."""

    zeros: Tensor

    @property
    def fixed(self) -> frozenset[str]:
        """The zeros have a gradient, and are never stepped."""
        return frozenset()

    @property
    def restarted(self) -> None:
        """It is in no state."""

    @property
    def product(self) -> None:
        """It is in no state."""

    @property
    def through(self) -> None:
        """It is applied."""

    @classmethod
    def of(cls, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> "Probe":
        """Return the probe of a weight of that shape."""
        return cls(torch.zeros((), dtype=dtype, device=device).expand(shape).requires_grad_())

    @property
    def ndim(self) -> int:
        """The dimensions of the weight."""
        return self.zeros.ndim

    def check(self, shape: torch.Size) -> None:
        """It fits the weight that it was made for."""

    def fold(self, W: Tensor) -> Tensor:
        """Return W."""
        return W + self.zeros.view(W.shape)

    def apply(self, x: Tensor, flipped: bool, out: Tensor) -> Tensor:
        """Return out; the product with zeros is for autograd to see."""
        return out + x @ (self.zeros.mT if flipped else self.zeros)

    def apply_(self, x: Tensor, flipped: bool, out: Tensor) -> None:
        """Leave out as it is."""

    def pull(
        self,
        x: Tensor,
        d: Tensor,
        kept: Tensor | None,
        flipped: bool,
        d_x: Tensor | None,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        """Return the gradient of the weight."""
        return (d.mT @ x if flipped else x.mT @ d,)

    def rows(self, embedding: Callable[..., Tensor], indices: Tensor, shape: torch.Size) -> Tensor:
        """Return rows of zeros."""
        return embedding(indices, self.zeros)

    def convolve(
        self, convolution: Callable[..., Tensor], x: Tensor, shape: torch.Size, *options: Any
    ) -> Tensor:
        """Convolve with zeros."""
        return convolution(x, self.zeros.view(shape), None, *options)

    def grouped(self, product: Callable[..., Tensor], x: Tensor, flipped: bool) -> Tensor:
        """Return zeros; a product of groups takes no matrix without memory."""
        out: Tensor = _Grouped.apply(product, flipped, x, self.zeros)  # type: ignore[no-untyped-call]
        return out

    def select(self, index: Any) -> "Probe":
        """Return the probe of the matrices W[index]."""
        return Probe(self.zeros[index])


class _Grouped(torch.autograd.Function):
    """Zeros, whose gradient by the weight is that of a product of groups with it."""

    @staticmethod
    def forward(ctx: Any, product: Any, flipped: bool, x: Tensor, zeros: Tensor) -> Tensor:
        ctx.product, ctx.flipped, ctx.shape = product, flipped, zeros.shape
        ctx.save_for_backward(x)
        return x.new_zeros(()).expand(len(x), zeros.shape[-2 if flipped else -1])

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors

        def compute(W: Tensor) -> Tensor:
            out: Tensor = ctx.product(x.detach(), W.mT if ctx.flipped else W)
            return out

        return None, None, None, *pulled(compute, [x.new_zeros(ctx.shape)], [True], d)
