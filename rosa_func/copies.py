"""A copy of a model's modules that shares all but the tensors, so that a call touches no model."""

import gc
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple
from weakref import ProxyTypes, ref

from torch import Tensor, nn

from rosa_func._torch import (
    FORWARD_TABLES,
    STATE_DICT_HOOKS,
    TENSOR_TABLES,
    hook_tables,
)

# How many objects to look through, at most, for one that holds a module.
_MANY = 50_000
# What holds no module, or what is the same for a copy.
_CLOSED = (Tensor, type, ModuleType, CodeType, str, bytes, int, float, complex, type(None))

# Attributes that are no links: tables that `copied` makes anew, hooks that no pass calls.
_TABLES_APART = {*TENSOR_TABLES, *STATE_DICT_HOOKS, "_modules", "_apply"}

Link = tuple[int, str]  # a module by its index, and one of its attributes


def copied(originals: list[nn.Module], links: Iterable[Link]) -> list[nn.Module]:
    """Return copies of the modules that are each other's children, with tables of their own.

    Their other attributes are those of the originals, but for the links, which lead to the copies.
    """
    copies: list[nn.Module] = [object.__new__(type(module)) for module in originals]
    counterparts: dict[int, Any] = dict(zip(map(id, originals), copies, strict=True))
    counterparts[id(None)] = None
    for original, copy in zip(originals, copies, strict=True):
        attributes = original.__dict__.copy()
        for table in FORWARD_TABLES:
            attributes[table] = attributes[table].copy()
        attributes.pop("_apply", None)  # a skeleton's own way to move; in a copy it is a cycle
        children = attributes["_modules"].items()
        attributes["_modules"] = {key: counterparts[id(child)] for key, child in children}
        object.__setattr__(copy, "__dict__", attributes)  # several times as fast as update
    for index, key in links:
        attributes = copies[index].__dict__
        attributes[key] = _moved(attributes[key], counterparts)
    return copies


def links(modules: list[nn.Module]) -> list[Link] | None:
    """Return the attributes by which modules lead to others besides the tables of children.

    None if a copy cannot follow one, such as a function that closes over a module.
    """
    inside = {id(module): _Placeholder() for module in modules}
    found: list[Link] = []
    clear: dict[int, Any] = {}
    for index, module in enumerate(modules):
        if not _is_plain(module):
            return None
        for key, value in _others(module):
            if _reaches(value, inside, clear):
                if _reaches(_moved(value, inside), inside, clear):
                    return None
                found.append((index, key))
    return found


class Outline(NamedTuple):
    """What `links` were found in, to see whether it is the same.

    Attributes:
        types: of all attributes.
        objects: those that may lead to modules: owner, key, address, length, and the object. Links
            are not held, since they would keep the model alive.
        hooks: their keys, which torch gives once.
    """

    types: list[type]
    objects: list[tuple[int, str, int, int, Any]]
    hooks: list[int]

    def is_of(self, modules: list[nn.Module]) -> bool:
        """Return whether it is still that of these modules."""
        if self.types != _types(modules) or self.hooks != _hooks(modules):
            return False
        for index, key, address, length, _ in self.objects:
            value = modules[index].__dict__.get(key)
            if id(value) != address or _length(value) != length:
                return False
        return True


def outline(modules: list[nn.Module], links: list[Link] | None) -> Outline:
    """Return the outline of modules with these links."""
    linked = set(links or ())
    objects = [
        (index, key, id(value), _length(value), None if (index, key) in linked else value)
        for index, module in enumerate(modules if links is not None else ())
        for key, value in _others(module)
        if not isinstance(value, _CLOSED) and key not in FORWARD_TABLES
    ]
    return Outline(_types(modules), objects, _hooks(modules))


def _others(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the attributes that may lead to other modules, but for the tables of children."""
    for key, value in module.__dict__.items():
        if key not in _TABLES_APART:
            yield key, value


def _length(value: Any) -> int:
    return len(value) if type(value) in (list, dict, set, tuple) else 0


def _types(modules: list[nn.Module]) -> list[type]:
    return list(map(type, chain.from_iterable(map(dict.values, map(vars, modules)))))


def _hooks(modules: list[nn.Module]) -> list[int]:
    tables = chain.from_iterable(map(hook_tables, map(vars, modules)))
    return list(chain.from_iterable(filter(None, tables)))


class _Placeholder:
    """Stands for the copy of a module; weak references to it can be made."""


def _is_plain(module: nn.Module) -> bool:
    """Return whether a module is what its `__dict__` says, and nothing besides."""
    return type(module).__basicsize__ == nn.Module.__basicsize__


def _moved(value: Any, counterparts: Mapping[int, Any]) -> Any:
    """Return the value with modules replaced, in containers, bound methods and partials too."""
    if id(value) in counterparts:
        return counterparts[id(value)]
    kind = type(value)
    if kind is ref:
        target = value()
        moved = _moved(target, counterparts)
        return value if moved is target else ref(moved)
    if kind is MethodType:
        return MethodType(value.__func__, _moved(value.__self__, counterparts))
    if kind is partial:
        function, *args = (_moved(part, counterparts) for part in (value.func, *value.args))
        return partial(function, *args, **_moved(value.keywords, counterparts))
    if kind in (list, tuple):
        return kind(_moved(item, counterparts) for item in value)
    if kind in (dict, OrderedDict):
        return kind((key, _moved(item, counterparts)) for key, item in value.items())
    return value


def _reaches(value: Any, inside: Mapping[int, Any], clear: dict[int, Any]) -> bool:
    """Return whether a value leads to one of the modules; `clear` has what is known not to."""
    seen: dict[int, Any] = {}
    left = [value]
    while left:
        value = left.pop()
        if id(value) in inside:
            return True
        if isinstance(value, _CLOSED) or id(value) in clear or id(value) in seen:
            continue
        seen[id(value)] = value
        if len(seen) > _MANY:
            return True
        if type(value) in ProxyTypes:
            return True  # it cannot be asked for what it stands for
        if isinstance(value, ref):
            left.append(value())
        elif isinstance(value, FunctionType):  # but not its globals
            left += [value.__closure__, value.__defaults__, value.__kwdefaults__, value.__dict__]
        else:
            left += gc.get_referents(value)
    clear.update(seen)
    return False
