"""What storing a residual takes, and how and where it is kept."""

import os
from tempfile import mkstemp
from typing import NamedTuple

import torch
from torch import Tensor

from rosa_func.weight.gathering import is_sharded
from rosa_func.weight.parts import Weight

Place = str | os.PathLike[str] | None  # None: beside the weight; "cpu"; or a folder
HOST = "cpu"
_PREFIX = "rosa-compensation-"


class Kept(NamedTuple):
    """How a compensation is kept.

    Attributes:
        dtype: of it.
        place: None for beside the weight, "cpu" for the host, or a folder.
    """

    dtype: torch.dtype
    place: Place = None

    def keep(self, lost: Tensor) -> Tensor:
        """Return what was lost in that dtype, at that place; in a folder always a new copy."""
        lost = lost.detach().to(self.dtype)
        if self.place is None:
            return lost
        return lost.cpu() if self.place == HOST else _mapped(lost, self.place)


def kept_as(w: Weight) -> Kept | None:
    """Return how the compensation of a weight is kept, so that the next one is kept alike."""
    return None if w.lost is None else Kept(w.lost.dtype, place_of(w.lost, w.base.device))


def place_of(lost: Tensor, device: torch.device) -> str | None:
    """Return the place, as `Kept` names it, of a compensation of a weight on that device."""
    if lost.device.type != HOST or is_sharded(lost):
        return None
    # In memory that no file is mapped to, this is None.
    folder, name = os.path.split(lost.untyped_storage().filename or "")
    if name.startswith(_PREFIX):
        return folder
    return HOST if device.type != HOST else None


def placed_like(old: Tensor, new: Tensor) -> Tensor:
    """Return a tensor in the folder in which another one is mapped, if it is."""
    return Kept(new.dtype, place_of(old, old.device)).keep(new)


def check_place(place: Place, said: str = "compensation is") -> Place:
    """Return a place as `Kept` names it, after refusing what is none."""
    if place is None or place == HOST:
        return place
    if not isinstance(place, str | os.PathLike):
        raise TypeError(f"{said} None, 'cpu' or a folder, got {place!r}")
    folder = os.path.abspath(place)
    _mapped(torch.empty(0), folder)
    return folder


def _mapped(tensor: Tensor, folder: str | os.PathLike[str]) -> Tensor:
    """Copy a tensor to a file that is mapped into memory.

    The file has no name any more once it is mapped. So it is gone with the tensor, or with the
    process, and no two of them meet. It is written before, since a disk that is found to be full
    at a write to mapped memory ends the process.
    """
    values = tensor.cpu().flatten().view(torch.uint8)
    try:
        file, name = mkstemp(prefix=_PREFIX, dir=folder)
        try:
            with open(file, "wb") as opened:
                opened.write(values.numpy().data if len(values) else bytes(tensor.itemsize))
            size = max(1, tensor.numel())
            mapped = torch.from_file(name, shared=True, size=size, dtype=tensor.dtype)
        finally:
            os.unlink(name)
    except OSError as error:
        raise OSError(
            error.errno,
            f"a compensation of {len(values):,} bytes cannot be kept in {folder}: "
            f"{error.strerror}. Make the folder, or room in it, or choose another place: "
            "compensation=... or master=... of init, or keep_compensation(state, ...)",
        ) from error
    return mapped[: tensor.numel()].view(tensor.shape)
