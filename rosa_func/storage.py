"""How the residuals of a state are to be stored, by the options of `init`."""

from typing import NamedTuple

from tensordict import TensorDict
from torch import Tensor

from rosa_func.weight import Base, Weight, read, write
from rosa_func.weight.dense import Dense
from rosa_func.weight.keeping import Kept, Place, check_place, place_of
from rosa_func.weight.rounding import compensation_dtype


class Storage(NamedTuple):
    """How residuals are stored, and what is kept of what storing takes.

    Attributes:
        exact: as in `init`.
        compensation: as in `init`.
    """

    exact: bool | None = None
    compensation: Place = None

    def check(self) -> "Storage":
        """Return this, after refusing options of the wrong type."""
        if self.exact is not None and not isinstance(self.exact, bool):
            raise TypeError(f"exact is True, False or None, got {self.exact!r}")
        return self._replace(compensation=check_place(self.compensation))

    def like(self, W: Tensor) -> Base:
        """Return a base that stores residuals as that of W is to be stored."""
        return Dense(W)

    def kept(self, W: Tensor) -> Kept | None:
        """Return how the compensation of W is kept, None for not at all."""
        dtype = compensation_dtype(W.dtype, self.exact)
        return None if dtype is None else Kept(dtype, self.compensation)


def keep_compensation(state: TensorDict, place: Place) -> TensorDict:
    """Put the compensation of a state somewhere else, as `init` does by its `compensation`.

    A state that was loaded or moved as a whole has it beside the weights. `resample` then keeps it
    where it is:

        state = keep_compensation(state.to("cuda"), "cpu")

    Args:
        state: a state of `init` or `resample`.
        place: None for beside the weights, "cpu" for the host, or a folder in which it is
            memory-mapped.

    Returns:
        A new state; all but the compensation is the given one's own.

    Raises:
        TypeError: if the place is none of these.
        OSError: if the folder is gone, full, or not to be written to.

    Example:
        >>> import rosa_func, tempfile, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4)).bfloat16()
        >>> state = rosa_func.init(model, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     state = rosa_func.keep_compensation(state, folder)
        ...     state = rosa_func.resample(state, 1)  # in the folder as well
    """
    place = check_place(place)
    parts = read(state)

    def moved(w: Weight) -> Weight:
        if w.lost is None or place_of(w.lost, w.base.device) == place:
            return w
        lost = w.lost.to(w.base.device, copy=True)  # into memory, which may be all that is asked
        return w._replace(lost=Kept(lost.dtype, place).keep(lost))

    weights = {name: moved(w) for name, w in parts.adapted().items()}
    return write(parts._replace(frozen={**parts.frozen, **weights}))
