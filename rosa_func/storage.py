"""How the residuals of a state are to be stored, by the options of `init`."""

import os
from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from rosa_func.weight import Base, Weight, read, write
from rosa_func.weight.dense import Dense
from rosa_func.weight.keeping import Kept, Place, check_place, place_of
from rosa_func.weight.layout import refuse_sharded
from rosa_func.weight.quantised import QUANTISED
from rosa_func.weight.rounding import compensation_dtype

Master = bool | str | os.PathLike[str] | None  # None: nowhere; True: beside the weight


class Storage(NamedTuple):
    """How residuals are stored, and what is kept of what storing takes.

    Attributes:
        exact: as in `init`.
        compensation: as in `init`.
        quantize: as in `init`.
        master: as in `init`.
    """

    exact: bool | None = None
    compensation: Place = None
    quantize: str | None = None
    master: Master = None

    def check(self) -> "Storage":
        """Return this, after refusing options of the wrong type, or that do not go together."""
        if self.exact is not None and not isinstance(self.exact, bool):
            raise TypeError(f"exact is True, False or None, got {self.exact!r}")
        if self.quantize is not None and not isinstance(self.quantize, str):
            raise TypeError(f"quantize is a word such as 'nf4', or None; got {self.quantize!r}")
        if self.quantize is not None and self.quantize not in QUANTISED:
            known = ", ".join(map(repr, QUANTISED))
            raise ValueError(f"quantize is one of {known}, or None; got {self.quantize!r}")
        if self.master and self.quantize is None:
            raise ValueError(
                f"master={self.master!r} keeps what quantising takes: pass quantize as well. What "
                "rounding takes is kept by exact"
            )
        if self.exact and self.quantize is not None and not self.master:
            raise ValueError(
                f"exact=True keeps what quantize={self.quantize!r} takes in a master: pass "
                "master=True (for beside the weight), 'cpu' or a folder"
            )
        if self.compensation is not None and self.quantize is not None:
            raise ValueError(
                f"compensation={self.compensation!r} is a place for what rounding takes; for what "
                f"quantize={self.quantize!r} takes pass master={self.compensation!r}"
            )
        master = self.master
        return self._replace(
            compensation=check_place(self.compensation),
            master=master if isinstance(master, bool) else check_place(master, "master is"),
        )

    def like(self, W: Tensor, batch: bool) -> Base:
        """Return a base that stores residuals as that of W, or a batch of them, is to be stored."""
        return Dense(W) if self.quantize is None else QUANTISED[self.quantize].of(W, batch)

    def kept(self, W: Tensor) -> Kept | None:
        """Return how the compensation of W is kept, None for not at all."""
        if self.quantize is None:
            dtype = compensation_dtype(W.dtype, self.exact)
            return None if dtype is None else Kept(dtype, self.compensation)
        if not self.master:
            return None
        place = None if self.master is True else self.master
        return Kept(torch.float64 if self.exact else _master_dtype(W), place)


def _master_dtype(W: Tensor) -> torch.dtype:
    """Return float16, which keeps more, but for a weight whose values are not in its range."""
    if W.is_meta:  # it has no values; either takes as much memory
        return torch.float16
    size = float(W.detach().abs().amax())
    return torch.float16 if 2**-10 < size < 2**15 else torch.bfloat16


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
    refuse_sharded(state, "keep_compensation")
    parts = read(state)

    def moved(w: Weight) -> Weight:
        if w.lost is None or place_of(w.lost, w.base.device) == place:
            return w
        lost = w.lost.to(w.base.device, copy=True)  # into memory, which may be all that is asked
        return w._replace(lost=Kept(lost.dtype, place).keep(lost))

    weights = {name: moved(w) for name, w in parts.adapted().items()}
    return write(parts.with_adapted(weights))
