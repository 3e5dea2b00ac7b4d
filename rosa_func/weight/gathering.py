"""Gathers: tensors whose rows are spread over the ranks of a mesh, made whole for a while.

A gather is a collective: every rank has to gather the same weights in the same order. That order
is learned. Where it is as before, no more is sent than the rows, and the next weight comes while
this one computes. Where it is not, the ranks first tell each other which weight they gather.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from rosa_func._torch import is_only_holder, memory_of, timeout_of

# Its name in this torch; there is none in a build without torch.distributed.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)

AHEAD = True  # whether the next weight is gathered while this one computes

_SLOTS = 2  # buffers that are used again: the weight that computes, and the next one
_ROOM = 8  # times what is asked for, beyond which a buffer is let go: it was an embedding's
_ALIGNED = 64  # bytes
_CONTEXT = 32  # gathers that tell which comes next; more than the weights of a checkpointed segment
_CONTEXTS = 2**16  # that are remembered

Order = dict[tuple[str, ...], str]  # the names of the last gathers, and of the one that followed


def is_sharded(value: Any) -> bool:
    """Return whether a tensor is a DTensor, in a transform of torch.func too.

    The module of DTensors need not be imported for that.
    """
    kind = type(bare(value))
    return kind is not Tensor and hasattr(kind, "device_mesh")


def bare(value: Any) -> Any:
    """Return a tensor from under what transforms of torch.func put round it."""
    return value if torch.compiler.is_compiling() else memory_of(value)


def group_of(tensor: Any) -> dist.ProcessGroup:
    """Return the ranks over which the rows of a DTensor are spread."""
    mesh, placements = tensor.device_mesh, tensor.placements
    if not placements[-1].is_shard(0) or not all(p.is_replicate() for p in placements[:-1]):
        raise ValueError(
            f"a sharded weight has its rows spread over the last dimension of its mesh, not the "
            f"placements {tuple(placements)}: see rosa_func.distributed.shard (states that are "
            "sharded cannot be stacked)"
        )
    group: dist.ProcessGroup = mesh.get_group(mesh.ndim - 1)
    return group


def is_matrix(tensor: Tensor) -> bool:
    """Return whether a frozen tensor that is not adapted is sharded by default."""
    return tensor.ndim > 1 and tensor.is_floating_point()


def has_rows(shape: Sequence[int]) -> bool:
    """Return whether a tensor can be spread by rows; one row alone stays whole."""
    return len(shape) > 0 and shape[0] > 1


def rows_each(rows: int, size: int) -> int:
    """Return how many rows each of `size` ranks has; the last ones may have fewer, or none."""
    return -(-rows // size)


def filled(rows: Tensor, count: int) -> Tensor:
    """Return rows as bytes, filled up to that many, since a collective sends as many of each."""
    if len(rows) < count:
        enough = rows.new_zeros(count, *rows.shape[1:])
        enough[: len(rows)] = rows
        rows = enough
    return rows.contiguous().view(-1).view(torch.uint8)


def cut(received: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the tensor that these bytes begin with; `filled` reversed."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return received[:size].view(dtype).view(shape)


class Gather(NamedTuple):
    """A gather that was begun."""

    name: str
    wholes: list[Tensor]
    works: list[Any]
    sent: list[Tensor]  # which is not to go meanwhile

    def end(self) -> list[Tensor]:
        """Wait for it, and return the whole tensors."""
        with naming(self.name):
            for work in self.works:
                work.wait()
        return self.wholes


def begin(name: str, tensors: Iterable[Any]) -> Gather:
    """Begin to gather the tensors of a weight."""
    with torch.inference_mode(False), torch.no_grad(), naming(name):
        given = [(tensor, group_of(tensor)) for tensor in tensors]
        sent = [
            filled(tensor.to_local(), rows_each(len(tensor), dist.get_world_size(group)))
            for tensor, group in given
        ]
        sizes = [
            len(one) * dist.get_world_size(group)
            for one, (_, group) in zip(sent, given, strict=True)
        ]
        places = [0]
        for size in sizes:
            places.append(places[-1] + size + -size % _ALIGNED)
        buffer = _buffer(places[-1], sent[0].device)
        wholes, works = [], []
        for place, size, one, (tensor, group) in zip(places, sizes, sent, given, strict=False):
            received = buffer[place : place + size]
            works.append(_all_gather(received, one, group, async_op=True))
            wholes.append(cut(received, tensor.shape, tensor.dtype))
        return Gather(name, wholes, works, sent)


def gathered(name: str, tensors: Sequence[Any]) -> list[Tensor]:
    """Return the tensors of a weight as a whole, outside of any pass."""
    agree(name, [name], tensors[0])
    return begin(name, tensors).end()


def agree(name: str, known: Iterable[str], tensor: Any) -> None:
    """Make sure that all ranks are about to gather the weight of that name.

    They tell each other in a group of its own. So a rank that asks while the others gather neither
    gives them its answer for a weight, nor ends its process, as gloo would where sizes differ: all
    of them wait until the time of their group is over.

    Raises:
        RuntimeError: on every rank, if they are not.
    """
    mesh, group = tensor.device_mesh, group_of(tensor)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    own = torch.tensor([crc32(name.encode())])
    all_of_them = own.new_empty(size)
    with torch.no_grad(), naming(name):
        if mesh not in _asking:
            _asking[mesh] = dist.new_group(
                dist.get_process_group_ranks(group),
                timeout=timeout_of(group, tensor.device),
                backend="gloo",
                use_local_synchronization=True,
            )
        _all_gather(all_of_them, own, _asking[mesh])
    found = all_of_them.tolist()
    if len(set(found)) > 1:
        names = {crc32(one.encode()): one for one in known}
        said = [names.get(code, "a weight that this rank does not have") for code in found]
        raise RuntimeError(
            f"the ranks gather different weights, by rank: {said}; this is rank {rank} of them. "
            "Each rank has to compute with the same weights in the same order: no layer may be "
            "skipped on some ranks alone, or printed, or saved"
        )


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Let the errors of a collective say which weight it was for."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{name} could not be gathered from all ranks: one of them has ended, hangs, or "
            "computes with other weights (a layer that is skipped on some ranks alone); look for "
            f"the first error of the other ranks. torch.distributed says: {error}"
        ) from error


class Pass:
    """The gathers of one forward pass and its backward pass.

    Args:
        spread: {name: the DTensors of a weight} of all weights that the pass may need.
    """

    def __init__(self, spread: Mapping[str, Sequence[Any]]) -> None:
        """Begin at the first weight."""
        self._spread = spread
        mesh = next(iter(spread.values()))[0].device_mesh
        orders = _orders.setdefault(mesh, ({}, {}))
        self._order = orders[torch.is_grad_enabled()]  # whether a backward pass may follow
        self._context: tuple[str, ...] = ()
        self._ahead: Gather | None = None

    def gathered(self, name: str) -> list[Tensor]:
        """Return the tensors of that weight as a whole, and begin with those of the next one.

        What comes next is known of the last 32 gathers: those of a checkpointed segment are
        followed by another one in the forward pass than in the backward pass.
        """
        begun, self._ahead = self._ahead, None
        if self._order.get(self._context) != name:
            agree(name, self._spread, self._spread[name][0])
            if len(self._order) >= _CONTEXTS:
                self._order.clear()
            self._order[self._context] = name
        if begun is None or begun.name != name:
            begun = begin(name, self._spread[name])
        self._context = (*self._context, name)[-_CONTEXT:]
        wholes = begun.end()
        following = self._order.get(self._context)
        if AHEAD and following in self._spread:
            self._ahead = begin(following, self._spread[following])
        return wholes


# By mesh, itself and not its equals: the order of passes that have no backward pass, and of those
# that may have one.
_orders: Any = WeakIdKeyDictionary()
_asking: Any = WeakIdKeyDictionary()  # by mesh: the group in which ranks tell what they gather
_buffers: dict[torch.device, list[Tensor]] = {}


def _buffer(size: int, device: torch.device) -> Tensor:
    """Return memory of that many bytes at least, which nobody else has.

    Fresh memory takes as long as a gather. A buffer is used again only when all that was made of
    it is gone: what autograd or a product holds is left alone.
    """
    slots = _buffers.setdefault(device, [])
    free = [place for place, slot in enumerate(slots) if is_only_holder(slot)]
    for place in free:
        if size <= len(slots[place]) <= _ROOM * size:
            return slots[place]
    new = torch.empty(size, dtype=torch.uint8, device=device)
    if len(slots) == _SLOTS:
        del slots[free[0] if free else 0]
    slots.append(new)
    return new
