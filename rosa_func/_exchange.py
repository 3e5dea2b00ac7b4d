"""A resample shared by several processes: each draws for some weights, and sends what it drew."""

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor

from rosa_func import cycle
from rosa_func._together import all_told, broadcast, description, global_rank, refuse_different
from rosa_func.drawing import check_draw, draw_all
from rosa_func.samplers import Sampler
from rosa_func.weight import Parts, Weight, read, write
from rosa_func.weight.donating import APART, Handover
from rosa_func.weight.gathering import (
    cut,
    filled,
    group_of,
    has_rows,
    is_sharded,
    naming,
    rows_each,
)
from rosa_func.weight.keeping import kept_as
from rosa_func.weight.layout import (
    Path,
    entries,
    from_entries,
    is_compensation,
    is_drawn,
    is_frozen,
)
from rosa_func.weight.sharded import Sharded, of_rows

Entries = dict[Path, Tensor]
Known = dict[Path, tuple[torch.dtype, torch.Size]]


def is_alone(group: dist.ProcessGroup | None) -> bool:
    """Return whether there is no other process to share with."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1


def drawn_again(
    state: TensorDict,
    key: int,
    sampler: Sampler,
    handover: Handover,
    group: dist.ProcessGroup | None = None,
    *,
    is_checked: bool = True,
) -> TensorDict:
    """Do what `resample` does, with a `handover` of the old parts."""

    def facts() -> dict[str, Any]:
        check_draw(key, sampler)
        if not is_checked:
            cycle.refuse_shared(state)
        called = getattr(sampler, "__qualname__", type(sampler).__name__)
        return {"the key": key, "the sampler": called, **described(state)}

    if not is_alone(group):
        refuse_different(facts, "resample", group)
    parts = read(state)
    adapted = parts.adapted()
    sharded = {name: w for name, w in adapted.items() if isinstance(w.base, Sharded)}
    if not sharded:
        return _drawn_apart(state, key, sampler, handover, group)
    whole: dict[str, Any] = {n: w for n, w in adapted.items() if n not in sharded}
    rest = write(Parts(whole, parts.full, parts.dtypes))
    new = read(_drawn_apart(rest, key, sampler, handover, group))
    drawn = _drawn_in_turns(sharded, key, sampler, handover)
    return write(parts.with_adapted(new.adapted() | drawn)._replace(full=new.full))


def _drawn_apart(
    state: TensorDict,
    key: int,
    sampler: Sampler,
    handover: Handover,
    group: dist.ProcessGroup | None,
) -> TensorDict:
    """Draw for a share of the weights, of which every process has all, and exchange them."""
    if is_alone(group):
        return cycle.drawn_again(state, key, None, sampler, handover)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    parts = read(state)
    adapted = parts.adapted()
    share: dict[str, Any] = {name: adapted[name] for name in list(adapted)[rank::size]}
    own: dict[str, Weight] = {}
    full: dict[str, Tensor] = {}

    def draw() -> dict[str, Known]:
        new = cycle.drawn_again(write(Parts(share, parts.full)), key, None, sampler, handover)
        drawn = read(new)
        own.update(drawn.adapted())
        full.update(drawn.full)
        return _known(own)

    new: dict[str, Weight] = {}
    for owner, each in enumerate(all_told(draw, "resample", group)):
        for name, shapes in each.items():
            mine = entries(_of_one(name, own[name])) if owner == rank else {}
            sent: Entries = {}
            for path, (dtype, shape) in shapes.items():
                if not is_drawn(path):
                    sent[path] = entries(_of_one(name, adapted[name]))[path].clone()
                    continue
                # Where its owner has it, too: backends of GPUs send nothing that is on the host.
                place = adapted[name].base.device
                sent[path] = _broadcast(mine.get(path), dtype, shape, place, owner, group)
                kept = kept_as(adapted[name])
                if is_compensation(path) and kept is not None:
                    sent[path] = mine[path] if owner == rank else kept.keep(sent[path])
            found = read(from_entries(sent)).adapted()[name]
            new[name] = found if owner == rank else handover.weight(name, adapted[name], found)
    return write(parts.with_adapted(new)._replace(full=full))


def _drawn_in_turns(
    adapted: dict[str, Weight], key: int, sampler: Sampler, handover: Handover
) -> dict[str, Weight]:
    """Draw for sharded weights: in each turn every rank of a mesh has one as a whole.

    It is collected from all ranks, drawn for, and dealt out again by rows.
    """
    groups = {name: group_of(_like(w)) for name, w in adapted.items()}
    new: dict[str, Weight] = {}
    for group in dict.fromkeys(groups.values()):
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        names = [name for name in adapted if groups[name] == group]
        for start in range(0, len(names), size):
            turn = names[start : start + size]
            own: dict[str, Any] = {}
            for owner, name in enumerate(turn):
                collected = _collected(name, adapted[name], owner, group)
                own |= {name: collected} if collected is not None else {}

            def draw(own: dict[str, Any] = own) -> dict[str, Known]:
                drawn = cycle.drawn_again(write(Parts({**own}, {})), key, None, sampler, APART)
                own.update(read(drawn).adapted())
                return _known(own)

            told = all_told(draw, "resample", group)
            for owner, name in enumerate(turn):
                mine = own.pop(name) if owner == rank else None
                before, like = entries(_of_one(name, adapted[name])), _like(adapted[name])
                dealt = _dealt(name, before, like, mine, told[owner][name], owner, group)
                new[name] = handover.weight(name, adapted[name], dealt)
    return new


def made_in_turns(
    work: Callable[[str], Weight], names: Collection[str], like: Any
) -> dict[str, Weight]:
    """Make weights, sharded as `like`: in each turn every rank makes one and deals it out."""
    group = group_of(like)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    new: dict[str, Weight] = {}
    for start in range(0, len(names), size):
        turn = list(names)[start : start + size]
        own: dict[str, Weight] = {}

        def make(turn: list[str] = turn, own: dict[str, Weight] = own) -> dict[str, Known]:
            own.update(draw_all(work, dict.fromkeys(turn[rank : rank + 1], like.device), {}))
            return _known(own)

        told = all_told(make, "init", group)
        for owner, name in enumerate(turn):
            mine = own.pop(name) if owner == rank else None
            new[name] = _dealt(name, {}, like, mine, told[owner][name], owner, group)
    return new


def _known(own: dict[str, Weight]) -> dict[str, Known]:
    """Return what the others are to know of what was drawn: its dtypes and shapes.

    The entries of a weight are the same in every process; only its owner knows their shapes.
    """
    tensors = {name: entries(_of_one(name, w)) for name, w in own.items()}
    return {name: {p: (t.dtype, t.shape) for p, t in ts.items()} for name, ts in tensors.items()}


def described(state: TensorDict, *what: str) -> dict[str, str]:
    """Return what is the same in every process, by name: all that a draw reads.

    That is not all of a state: each process has its own statistics of BatchNorm.
    """
    parts = read(state)
    return {
        ".".join((*what, *path)): description(tensor)
        for path, tensor in entries(write(Parts({**parts.adapted()}, parts.full))).items()
    }


def _collected(name: str, w: Weight, owner: int, group: dist.ProcessGroup) -> Weight | None:
    """Return the whole weight in the process of its owner, None in the others."""
    found: Entries = {}
    for path, tensor in entries(_of_one(name, w)).items():
        rows = _gathered(name, tensor, owner, group) if is_sharded(tensor) else tensor
        if rows is not None:
            found[path] = rows
    if dist.get_rank(group) != owner:
        return None
    return read(from_entries(found)).adapted()[name]


def _gathered(name: str, tensor: Any, owner: int, group: dist.ProcessGroup) -> Tensor | None:
    size = dist.get_world_size(group)
    with torch.no_grad(), naming(name):
        rows = filled(tensor.to_local(), rows_each(len(tensor), size))
        if dist.get_rank(group) != owner:
            dist.gather(rows, None, global_rank(owner, group), group)
            return None
        received = rows.new_empty(size * len(rows))
        dist.gather(rows, list(received.view(size, -1)), global_rank(owner, group), group)
        return cut(received, tensor.shape, tensor.dtype)


def _dealt(
    name: str,
    before: Entries,
    like: Any,
    mine: Weight | None,
    shapes: Known,
    owner: int,
    group: dist.ProcessGroup,
) -> Weight:
    """Return a weight that its owner has drawn, sharded as `like`; `before` are the old entries."""
    have = {} if mine is None else entries(_of_one(name, mine))
    place = like.device
    found: Entries = {}
    for path, (dtype, shape) in shapes.items():
        if not is_drawn(path) and path in before:
            found[path] = before[path].clone()
        elif is_frozen(path) and has_rows(shape):
            rows = _scattered(name, have.get(path), dtype, shape, place, owner, group)
            found[path] = of_rows(rows, shape, like)
        else:
            found[path] = _broadcast(have.get(path), dtype, shape, place, owner, group)
    return read(from_entries(found)).adapted()[name]


def _scattered(
    name: str,
    mine: Tensor | None,
    dtype: torch.dtype,
    shape: torch.Size,
    place: torch.device,
    owner: int,
    group: dist.ProcessGroup,
) -> Tensor:
    """Return this process's rows of a tensor that its owner has."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    count = rows_each(shape[0], size)
    each = torch.empty(count, *shape[1:], dtype=dtype, device=place)
    parts = None
    if mine is not None:
        parts = [filled(mine[r * count : (r + 1) * count].to(place), count) for r in range(size)]
    with naming(name):
        dist.scatter(each.view(-1).view(torch.uint8), parts, global_rank(owner, group), group)
    return each[: max(0, min(count, shape[0] - rank * count))].clone()


def _broadcast(
    mine: Tensor | None,
    dtype: torch.dtype,
    shape: torch.Size,
    place: torch.device,
    owner: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Return a tensor that its owner has."""
    sent = torch.empty(shape, dtype=dtype, device=place) if mine is None else mine.to(place)
    sent = sent.contiguous()
    broadcast(sent, owner, "resample", group)
    return sent


def _like(w: Weight) -> Any:
    base: Any = w.base
    return base.like


def _of_one(name: str, w: Weight) -> TensorDict:
    """Return the state of one weight."""
    return write(Parts({name: w}, {}))
