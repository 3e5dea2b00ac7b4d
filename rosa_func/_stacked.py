"""What a stacked state is made of: entries that all members share, and entries of their own."""

from collections.abc import Callable
from functools import partial

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from rosa_func.weight import Parts, Weight, layout, read
from rosa_func.weight.layout import Path
from rosa_func.weight.low_rank import LowRank
from rosa_func.weight.rounding import is_zero


def parts_of_one(state: TensorDict) -> Parts:
    """Return what a state holds, after refusing a stacked one."""
    parts = read(state)
    if state.batch_size:
        raise ValueError(f"a state is stacked already, with {len(state)} members: unstack it first")
    return parts


def members_of(stacked: TensorDict) -> int:
    """Return how many members a stacked state has; refuse another."""
    if not isinstance(stacked, TensorDictBase):
        raise TypeError(f"a stacked state is a TensorDict, got {type(stacked).__name__}")
    if len(stacked.batch_size) != 1:
        raise ValueError(
            f"the state is not stacked: its batch size is {tuple(stacked.batch_size)}, and that of "
            "rosa_func.stacking.stack([state, ...]) is (members,)"
        )
    return len(stacked)


def from_entries(entries: dict[Path, Tensor], members: int) -> TensorDict:
    """Return the stacked state of these entries."""
    state = layout.from_entries(entries)
    state.batch_size = torch.Size([members])
    return state


def is_shared(path: Path, stacked: Tensor) -> bool:
    """Return whether all members have an entry in the same memory, and none trains it."""
    return stacked.stride(0) == 0 and not layout.trains(path)


def joined(path: Path, tensors: list[Tensor]) -> Tensor:
    """Stack an entry of all states, or expand it where all have the same that does not train."""
    first, *others = (tensor.detach() for tensor in tensors)
    if not layout.trains(path) and all(map(partial(_are_equal, first), others)):
        return first.expand(len(tensors), *first.shape)
    return torch.stack([first, *others])


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same values, without a look where memory is shared."""
    is_same = one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
    return is_same or torch.equal(one, other)


def with_factors(parts: Parts, changed: Callable[[str, LowRank], LowRank]) -> Parts:
    """Return the parts with other factors, as `changed` gives them by name."""

    def other(name: str, w: Weight) -> Weight:
        terms = [changed(name, term) if isinstance(term, LowRank) else term for term in w.terms]
        return w._replace(terms=tuple(terms))

    return of_each(parts, other)


def with_losses_of_one_shape(all_parts: list[Parts]) -> list[Parts]:
    """Fill up with zeros what has no elements in one state, as nothing was lost there."""
    found = [
        name
        for parts in all_parts
        for name, w in parts.adapted().items()
        if w.lost is not None and w.lost.numel()
    ]

    def filled(name: str, w: Weight) -> Weight:
        if w.lost is None or w.lost.numel() or name not in found:
            return w
        return w._replace(lost=w.lost.new_zeros(w.shape))

    return [of_each(parts, filled) for parts in all_parts]


def without_zeros(parts: Parts) -> Parts:
    """Keep no elements of what rounding took where that is nothing."""

    def emptied(name: str, w: Weight) -> Weight:
        is_nothing = w.lost is not None and is_zero(w.lost)
        return w._replace(lost=w.lost.new_empty(0)) if is_nothing else w  # type: ignore[union-attr]

    return of_each(parts, emptied)


def of_each(parts: Parts, changed: Callable[[str, Weight], Weight]) -> Parts:
    """Return the parts with each adapted weight as `changed` gives it."""
    return parts.with_adapted({name: changed(name, w) for name, w in parts.adapted().items()})


def refuse_unlike(first: dict[Path, Tensor], other: dict[Path, Tensor], place: int) -> None:
    """Refuse states that do not have the same entries, of the same shapes and dtypes."""
    advice = "stack states of one model, with the same targets and of one kind"
    if unlike := sorted(first.keys() ^ other.keys()):
        path = unlike[0]
        has, lacks = (0, place) if path in first else (place, 0)
        raise KeyError(f"state {has} has {_said(path)}, and state {lacks} does not: {advice}")
    for path, tensor in first.items():
        kinds = [(tuple(t.shape), str(t.dtype), str(t.device)) for t in (tensor, other[path])]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"{_said(path)} is {' '.join(map(str, kinds[0]))} in state 0 and "
                f"{' '.join(map(str, kinds[1]))} in state {place}: {advice}"
            )


def _said(path: Path) -> str:
    branch, *names = path
    return f"{'.'.join(names)} in {branch}"
