"""Who else would see that a tensor is written to."""

import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from rosa_func._torch import (
    address,
    base_of,
    is_wrapper,
    memory_holders,
    own_tables,
    tensor_holders,
    without_torch_function,
)
from rosa_func.weight.layout import entries, read

Named = list[tuple[str, Tensor]]


def shared_state(state: TensorDict, *owners: object) -> str | None:
    """Say who else would see that the residuals of a state, or what trains in full, are written to.

    None if nobody would, as far as torch and Python know.

    Args:
        state: the state.
        owners: what has the same tensors, and is to be told of the new ones.
    """
    branches = [v for v in state.values(include_nested=True) if isinstance(v, TensorDictBase)]

    def ask() -> str | None:
        held = list(entries(state).values())
        references = dict(zip(map(id, held), _references(held), strict=True))
        parts = read(state)
        frozen = [
            (name, tensor)
            for name, w in parts.adapted().items()
            for tensor in (*w.base, *([] if w.lost is None else [w.lost]))  # type: ignore[misc]
            if tensor.numel() and not is_wrapper(tensor)
        ]
        written = [*frozen, *parts.full.items()]
        is_held = any(references[id(tensor)] > 1 + bool(owners) for _, tensor in written)
        found = _sharer(written, held, [state, *branches, *owners], is_held)
        return found or _waiting_graph(frozen)

    return _asked_again(ask)


def shared_model(model: nn.Module, taken: Named) -> str | None:
    """Say who else would see that tensors of a model are written to, as `shared_state` does."""

    def ask() -> str | None:
        own = [*model.parameters(), *model.buffers()]
        return _sharer(taken, own, list(model.modules()), True) or _waiting_graph(taken)

    return _asked_again(ask)


def _asked_again(ask: Callable[[], str | None]) -> str | None:
    """Return the answer after a garbage collection, if any: what is in a cycle may be nobody's."""
    if ask() is None:
        return None
    gc.collect()
    return ask()


def _references(tensors: list[Tensor]) -> list[int]:
    """Return how many others in Python refer to each tensor of a list."""
    return [sys.getrefcount(tensors[place]) - _OWN for place in range(len(tensors))]


_OWN = 0
_OWN = _references([torch.empty(1, device="cpu")])[0]


def _sharer(
    written: Named, known: list[Tensor], owners: Iterable[object], is_held: bool
) -> str | None:
    """Say who shares memory, or, if something holds the tensors themselves, a tensor."""
    written = [(name, tensor) for name, tensor in written if address(tensor)]
    found = _shared_memory(written, known)
    if found is None and not is_held:
        return None  # without a look at all objects
    return _holder(written, {id(owner) for owner in owners}) or found


def _shared_memory(written: Named, known: list[Tensor]) -> str | None:
    """Say whose memory others than the known tensors have, or two of them."""
    by_memory: dict[int, dict[int, Tensor]] = {}
    for tensor in known:
        by_memory.setdefault(address(tensor), {})[id(tensor)] = tensor
    seen: set[int] = set()
    for name, tensor in written:
        together = by_memory[address(tensor)]
        if id(tensor) in seen or _overlap(together.values()):
            return f"{name} shares its memory with another tensor beside it"
        seen.add(id(tensor))
        # What a tensor is a view of has the memory, too.
        bases = {id(base) for one in together.values() if (base := base_of(one)) is not None}
        if memory_holders(tensor) > len(together.keys() | bases):
            return (
                f"{name} shares its memory with another tensor, such as a view of it, or one in a "
                "graph that waits for its backward pass"
            )
    return None


def _overlap(tensors: Iterable[Tensor]) -> bool:
    """Return whether two tensors of one memory have a byte in common."""
    ranges = []
    for tensor in tensors:
        if tensor.numel():
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            last = sum((size - 1) * stride for size, stride in steps)
            start = tensor.data_ptr()
            ranges.append((start, start + (last + 1) * tensor.itemsize))
    return any(end > start for (_, end), (start, _) in pairwise(sorted(ranges)))


def _waiting_graph(tensors: Named) -> str | None:
    """Say so if a graph would go back through one of these."""
    for name, tensor in tensors:
        if tensor_holders(tensor) > 1 + tensor.requires_grad:  # its gradient has one
            return (
                f"{name} is held by a graph that waits for its backward pass (call backward, or "
                "let go of what was computed)"
            )
    return None


def _holder(written: Named, owners: set[int]) -> str | None:
    """Name a module or a TensorDict that has one of these, and is none of the owners."""
    names = {address(tensor): name for name, tensor in written}
    with without_torch_function():  # which composed weights would answer by being formed
        for thing, key, tensor in _all_that_is_held():
            if (name := names.get(address(tensor))) and id(thing) not in owners:
                if isinstance(thing, nn.Module):
                    return f"{name} is in use, as {key} of a module {type(thing).__name__}"
                return f"{name} is in another state (or TensorDict), as {key}"
    return None


def _all_that_is_held() -> Iterator[tuple[Any, str, Tensor]]:
    """Yield all that modules and TensorDicts have: who has it, its name there, and the tensor."""
    has_tensors: dict[type, bool] = {}  # of a few hundred classes of half a million objects
    for thing in gc.get_objects():
        kind = type(thing)
        if kind not in has_tensors:
            has_tensors[kind] = issubclass(kind, nn.Module | TensorDict)
        if not has_tensors[kind]:
            continue
        tables = [dict(thing.items())] if isinstance(thing, TensorDict) else own_tables(thing)
        for table in tables:
            for key, tensor in (table or {}).items():  # none in a module that is still being made
                if isinstance(tensor, Tensor):
                    yield thing, key, tensor
