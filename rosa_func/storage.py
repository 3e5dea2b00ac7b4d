"""How the residuals of a state are to be stored, by the options of `init`."""

from typing import NamedTuple

from torch import Tensor

from rosa_func.weight import Base
from rosa_func.weight.dense import Dense
from rosa_func.weight.keeping import Kept
from rosa_func.weight.rounding import compensation_dtype


class Storage(NamedTuple):
    """How residuals are stored, and what is kept of what storing takes.

    Attributes:
        exact: as in `init`.
    """

    exact: bool | None = None

    def check(self) -> "Storage":
        """Return this, after refusing options of the wrong type."""
        if self.exact is not None and not isinstance(self.exact, bool):
            raise TypeError(f"exact is True, False or None, got {self.exact!r}")
        return self

    def like(self, W: Tensor) -> Base:
        """Return a base that stores residuals as that of W is to be stored."""
        return Dense(W)

    def kept(self, W: Tensor) -> Kept | None:
        """Return how the compensation of W is kept, None for not at all."""
        dtype = compensation_dtype(W.dtype, self.exact)
        return None if dtype is None else Kept(dtype)
