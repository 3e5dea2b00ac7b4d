"""Where a model keeps its tensors: found once, and looked up at each call."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import chain
from operator import is_
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from rosa_func import modules
from rosa_func._torch import content_tables, own_buffers, own_parameters, own_persistent_buffers
from rosa_func.copies import Link, Outline, copied, links, outline
from rosa_func.uncounted import writing_uncounted

Table = dict[str, Any]


class Slot(NamedTuple):
    """One place of a tensor.

    Attributes:
        owner: the index of the module that has it.
        is_buffer: whether it is a buffer.
        key: its name there.
        name: that of the state, None where no state holds it.
    """

    owner: int
    is_buffer: bool
    key: str
    name: str | None

    def table(self, owners: list[nn.Module]) -> Table:
        """Return the table of the owner in which the tensor is."""
        owner = owners[self.owner]
        return own_buffers(owner) if self.is_buffer else own_parameters(owner)


class Places(NamedTuple):
    """What depends on the structure of a model alone. Nothing in it keeps the model alive.

    Attributes:
        tensors: the parameters and persistent buffers, by their first names.
        slots: every place of each of them, and those of the other buffers.
        buffers: those of the persistent buffers among them.
        uncounted: the names of parameters to which a forward pass may write through `.data`.
        checkpointing: the names of the modules that may recompute, as transformers marks them,
            and their indices.
        modules: all of them.
        links: other ways from module to module; None if a copy cannot follow one.
        outline: what `links` were found in, to see whether there may be others.
        keys, values: of all tables of all modules, to see whether anything was replaced.
    """

    tensors: "dict[str, ref[Tensor]]"
    slots: list[Slot]
    buffers: list[Slot]
    uncounted: set[str]
    checkpointing: list[tuple[str, int]]
    modules: "list[ref[nn.Module]]"
    links: list[Link] | None
    outline: Outline
    keys: list[str]
    values: "list[ref[Any] | None]"

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shapes as they are now: `weight.data = ...` may have changed them."""
        own: Any = self.tensors
        return {name: tensor().shape for name, tensor in own.items()}

    def left_in(self, owners: list[nn.Module]) -> list[Tensor]:
        """Return the persistent buffers that the model, or a copy of its modules, has now."""
        return [slot.table(owners)[slot.key] for slot in self.buffers]

    def owners(self) -> list[nn.Module]:
        """Return the modules."""
        own: Any = self.modules
        return [module() for module in own]


_known: "WeakKeyDictionary[nn.Module, Places]" = WeakKeyDictionary()


@torch.compiler.disable  # type: ignore[untyped-decorator]  # after a graph break it is plain Python
def places(model: nn.Module) -> Places:
    """Return the places of a model, from the last call if no part of it was replaced since."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is an nn.Module, got {type(model).__name__}")
    found = _known.get(model)
    if found is None or not _is_current(found):
        found = _known[model] = _look(model)
    return found


class Swapped(AbstractContextManager[None]):
    """Other tensors in some places of a model while it is entered."""

    def __init__(self, tables: list[tuple[Table, str]], tensors: list[Tensor]) -> None:
        """Remember the places and their tensors."""
        self._tables, self._tensors = tables, tensors

    def __enter__(self) -> None:
        """Put them in."""
        self._own = [table[key] for table, key in self._tables]
        for (table, key), tensor in zip(self._tables, self._tensors, strict=True):
            table[key] = tensor

    def __exit__(self, *raised: object) -> None:
        """Put the model's own back."""
        for (table, key), tensor in zip(self._tables, self._own, strict=True):
            table[key] = tensor

    def again(self) -> "Swapped":
        """Return another swap of the same tensors, to be entered separately."""
        return Swapped(self._tables, self._tensors)


def swapped(found: Places, names: Mapping[str, str], weights: Mapping[str, Tensor]) -> Swapped:
    """Return the swap of these weights.

    Args:
        found: of the model.
        names: {the model's name: the name in `weights`}.
        weights: the tensors of a state.
    """
    owners = found.owners()
    tables, tensors = [], []
    for slot, tensor in _filled(found, owners, names, weights):
        table = slot.table(owners)
        if tensor is not table[slot.key]:
            tables.append((table, slot.key))
            tensors.append(tensor)
    return Swapped(tables, tensors)


def standing(
    found: Places, names: Mapping[str, str], weights: Mapping[str, Tensor]
) -> list[nn.Module] | None:
    """Return copies of the modules that have these weights, the model's first; see `swapped`.

    None if a copy cannot follow how the modules lead to each other.
    """
    if found.links is None:
        return None
    owners = found.owners()
    copies = copied(owners, found.links)
    for slot, tensor in _filled(found, owners, names, weights):
        slot.table(copies)[slot.key] = tensor
    return copies


def _filled(
    found: Places, owners: list[nn.Module], names: Mapping[str, str], weights: Mapping[str, Tensor]
) -> Iterator[tuple[Slot, Tensor]]:
    """Yield the tensor of each slot; buffers are cloned, since a forward pass may write to them."""
    clones: dict[int, Tensor] = {}
    for slot in found.slots:
        tensor = None if slot.name is None else weights[names[slot.name]]
        if slot.is_buffer:
            own: Any = slot.table(owners)[slot.key]
            tensor = own if tensor is None else tensor
            if id(own) not in clones:
                clones[id(own)] = tensor.clone()
            tensor = clones[id(own)]
        yield slot, tensor  # type: ignore[misc]


def _look(model: nn.Module) -> Places:
    named = dict(model.named_modules())
    _refuse_scripted(named)
    both = dict(chain(model.named_parameters(), modules.persistent_buffers(model)))
    first = {id(tensor): name for name, tensor in both.items()}
    slots = []
    for index, module in enumerate(named.values()):
        persistent = {name for name, _ in own_persistent_buffers(module)}
        for key, tensor in own_parameters(module).items():
            if tensor is not None:
                slots.append(Slot(index, False, key, first[id(tensor)]))
        for key, tensor in own_buffers(module).items():
            if tensor is not None:
                name = first[id(tensor)] if key in persistent else None
                slots.append(Slot(index, True, key, name))
    owners = list(named.values())
    tables = _tables(owners)
    values = chain.from_iterable(table.values() for table in tables)
    others = links(owners)
    return Places(
        tensors={name: ref(tensor) for name, tensor in both.items()},
        slots=slots,
        buffers=[slot for slot in slots if slot.is_buffer and slot.name],
        uncounted={
            first[id(parameter)]
            for module in writing_uncounted(owners)
            for parameter in module.parameters()
        },
        checkpointing=[
            (name, index)
            for index, (name, module) in enumerate(named.items())
            if hasattr(module, "gradient_checkpointing")
        ],
        modules=[ref(module) for module in owners],
        links=others,
        outline=outline(owners, others),
        keys=list(chain.from_iterable(tables)),
        values=[None if value is None else ref(value) for value in values],
    )


def _refuse_scripted(named: dict[str, nn.Module]) -> None:
    """Refuse modules whose tensors are not Python's to exchange."""
    for name, module in named.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"{name or 'the model'} was compiled by torch.jit.script, so that it cannot "
                "compute with other weights: keep the module from before torch.jit.script there, "
                "and script the merged model, rosa_func.export.to_module(model, state)"
            )


def _tables(modules: list[nn.Module]) -> list[Table]:
    """Return the tables of what each of the modules has itself."""
    return list(chain.from_iterable(map(content_tables, map(vars, modules))))


_GONE = object()


def _alive(reference: "ref[Any]") -> Any:
    value = reference()
    return _GONE if value is None else value


def _is_current(found: Places) -> bool:
    """Return whether every module has the tensors and children under the names that it had."""
    alive = [module() for module in found.modules]
    if None in alive or not found.outline.is_of(alive):  # type: ignore[arg-type]
        return False
    tables = _tables(alive)  # type: ignore[arg-type]
    keys = list(chain.from_iterable(tables))
    if len(keys) != len(found.keys) or not all(map(is_, keys, found.keys)):
        return False
    values = chain.from_iterable(table.values() for table in tables)
    # A tensor that is gone is not the None that may have taken its place.
    before = [None if value is None else _alive(value) for value in found.values]
    return all(map(is_, values, before))
