"""The sharded base: a residual of which each rank of a mesh has some rows.

Its tensors are DTensors, in rows: of R, of the codes and the scales of a quantised residual, of
the matrices of a batch. They say what the whole is; products gather its rows. So a residual is
cut where DTensor cuts it, and quantised ones are made dense of whole codes.
"""

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rosa_func._torch import is_fake, outside_transforms
from rosa_func.weight.gathering import (
    Pass,
    bare,
    gathered,
    group_of,
    has_rows,
    is_sharded,
    rows_each,
)
from rosa_func.weight.parallel import is_worker, map_weights
from rosa_func.weight.parts import Base, Weight, mapped

T = TypeVar("T")


class Sharded:
    """A base whose tensors are spread over the ranks of a mesh.

    It has no fields: neither autograd nor a transform follows its tensors. It is made dense for
    each product, in forward and again in backward.
    """

    _fields: tuple[str, ...] = ()
    coarse: bool
    apply = rows = select = None

    def __init__(self, stored: Base, name: str, running: Pass | None = None) -> None:
        """Take a base of DTensors; tensors of it that are small may be whole."""
        self.stored, self.name, self._running = stored, name, running
        self.coarse = stored.coarse

    def __iter__(self) -> Iterator[Tensor]:
        """Yield nothing, see above."""
        return iter(())

    def _replace(self) -> "Sharded":
        return self

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight."""
        return self.stored.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight."""
        return self.stored.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weight."""
        return self.stored.device

    @property
    def spread(self) -> dict[str, Any]:
        """The fields of the stored base that are DTensors."""
        return spread(self.stored)

    @property
    def like(self) -> Any:
        """A tensor that is sharded as this is."""
        return next(iter(self.spread.values()))

    def within(self, running: Pass) -> "Sharded":
        """Return the base as one of those that a pass gathers."""
        return Sharded(self.stored, self.name, running)

    def whole(self) -> Base:
        """Return the stored base, its tensors whole, in memory that is used again."""
        refuse_gathers(self.name)
        fields = self.spread
        with outside_transforms():
            if self._running is None:
                found = gathered(self.name, list(fields.values()))
            else:
                found = self._running.gathered(self.name)
        stored: Any = self.stored
        base: Base = stored._replace(**dict(zip(fields, found, strict=True)))
        return base

    def dense(self) -> Tensor:
        """Return R."""
        return self.whole().dense()

    def store(self, R: Tensor) -> "tuple[Sharded, Tensor | None]":
        """Store another R, which every rank has as a whole, as this one is stored."""
        stored, lost = self.stored.store(R)
        fields = [field for field in self.spread if has_rows(getattr(stored, field).shape)]
        return Sharded(mapped(stored, lambda t: shared(t, self.like), fields), self.name), lost


def spread(stored: Base) -> dict[str, Any]:
    """Return the fields of a base that are DTensors, from under what transforms put round them."""
    given: Any = stored
    named = zip(given._fields, given, strict=True)
    return {field: bare(value) for field, value in named if is_sharded(value)}


def refuse_gathers(name: str) -> None:
    """Refuse to gather where ranks cannot do so in one order, or there are no values."""
    instead = "gather the state first: rosa_func.distributed.gather(state)"
    if torch.compiler.is_compiling() or is_fake():
        raise ValueError(f"{name} is sharded, and a compiler cannot follow its gathers: {instead}")
    if is_worker():
        raise ValueError(
            f"{name} is sharded, and this function computes with several weights at once, in an "
            f"order of its own: {instead}"
        )


def shared(whole: Tensor, like: Any) -> Any:
    """Return a DTensor, sharded as `like` is, of this rank's rows of a tensor."""
    group = group_of(like)
    count = rows_each(len(whole), dist.get_world_size(group))
    rank = dist.get_rank(group)
    return of_rows(whole[rank * count : (rank + 1) * count].clone(), whole.shape, like)


def spread_over(mesh: Any) -> Any:
    """Return a DTensor whose rows are spread over the last dimension of a mesh."""
    tensors = import_module("torch.distributed.tensor")  # it takes a while, and few need it
    placements = [*[tensors.Replicate()] * (mesh.ndim - 1), tensors.Shard(0)]
    none = torch.empty(0, device=mesh.device_type)
    return tensors.DTensor.from_local(none, mesh, placements, run_check=False)


def of_rows(rows: Tensor, shape: torch.Size, like: Any) -> Any:
    """Return the DTensor of that shape of which this rank has these rows."""
    whole = torch.empty(shape, dtype=rows.dtype, device="meta")
    with torch.no_grad():
        return type(like).from_local(
            rows.contiguous(),
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )


def whole(name: str, tensor: Any) -> Tensor:
    """Return a tensor as it is, or its whole in memory of its own, where it is sharded."""
    if not is_sharded(tensor):
        plain: Tensor = tensor
        return plain
    refuse_gathers(name)
    (found,) = gathered(name, [tensor])
    return found.clone()


def whole_weight(name: str, w: Weight) -> Weight:
    """Return a weight whose base and compensation are whole; see `Sharded.whole`."""
    base = w.base.whole() if isinstance(w.base, Sharded) else w.base
    return w._replace(base=base, lost=None if w.lost is None else whole(name, w.lost))


def map_whole(work: Callable[[str, Weight], T], weights: Mapping[str, Weight]) -> dict[str, T]:
    """Return {name: work(name, weight)} of whole weights.

    Those that are sharded are gathered here, one at a time and in their order, and each is let go
    before the next.
    """

    def done(given: Mapping[str, Weight]) -> dict[str, T]:
        results = map_weights(lambda name: work(name, given[name]), given)
        return dict(zip(given, results, strict=True))

    found = done({name: w for name, w in weights.items() if not isinstance(w.base, Sharded)})
    for name, w in weights.items():
        if name not in found:
            found |= done({name: whole_weight(name, w)})
    return {name: found[name] for name in weights}


def in_one_pass(weights: Mapping[str, Weight]) -> Mapping[str, Weight]:
    """Return the weights so that a pass gathers those that are sharded, one ahead of its use."""
    bases = {name: w.base for name, w in weights.items() if isinstance(w.base, Sharded)}
    if not bases:
        return weights
    for name in bases:
        refuse_gathers(name)
    running = Pass({base.name: list(base.spread.values()) for base in bases.values()})
    within = {
        name: weights[name]._replace(base=base.within(running)) for name, base in bases.items()
    }
    return {**weights, **within}
