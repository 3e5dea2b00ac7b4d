"""A copy of a model's modules that shares all but the tensors, so that a call touches no model."""

import gc
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from rosa_func._torch import FORWARD_TABLES, STATE_DICT_HOOKS, TENSOR_TABLES, own_hooks

# How many objects to look through, at most, for one that holds a module.
_MANY = 50_000
# What holds no module, or what is the same for a copy.
_CLOSED = (Tensor, type, ModuleType, CodeType, str, bytes, int, float, complex, type(None))

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
        children = attributes["_modules"]
        attributes["_modules"] = {key: counterparts[id(child)] for key, child in children.items()}
        object.__setattr__(copy, "__dict__", attributes)  # several times as fast as update
    for index, key in links:
        attributes = copies[index].__dict__
        attributes[key] = _moved(attributes[key], counterparts)
    return copies


def links(modules: list[nn.Module]) -> list[Link] | None:
    """Return the attributes by which modules lead to others besides the tables of children.

    None if a copy cannot follow one, such as a function that closes over a module.
    """
    inside = {id(module): object() for module in modules}
    found: list[Link] = []
    clear: dict[int, Any] = {}
    for index, module in enumerate(modules):
        if not _is_plain(module):
            return None
        for key, value in module.__dict__.items():
            if key in TENSOR_TABLES or key in STATE_DICT_HOOKS or key == "_modules":
                continue
            if _reaches(value, inside, clear):
                if _reaches(_moved(value, inside), inside, clear):
                    return None
                found.append((index, key))
    return found


def size(modules: Iterable[nn.Module]) -> int:
    """Return how many attributes and hooks there are, to see whether some are new."""
    return sum(len(module.__dict__) + sum(map(len, own_hooks(module))) for module in modules)


def _is_plain(module: nn.Module) -> bool:
    """Return whether a module is what its `__dict__` says, and nothing besides."""
    return type(module).__basicsize__ == nn.Module.__basicsize__


def _moved(value: Any, counterparts: Mapping[int, Any]) -> Any:
    """Return the value with modules replaced, in containers, bound methods and partials too."""
    if id(value) in counterparts:
        return counterparts[id(value)]
    kind = type(value)
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
        if isinstance(value, FunctionType):  # but not its globals
            left += [value.__closure__, value.__defaults__, value.__kwdefaults__, value.__dict__]
        else:
            left += gc.get_referents(value)
    clear.update(seen)
    return False
