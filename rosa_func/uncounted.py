"""Writes that torch does not count: which modules may write to weights through `.data`."""

import inspect
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn


def writing_uncounted(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the modules with a method that names `.data` and that a forward pass may come to.

    It may come to `forward`, and to every method of the modules' classes that what it comes to
    names. What a method does with `.data`, and of which tensor, is not looked at: some only read.
    Torch's own classes are left out, and functions outside of classes are not seen.
    """
    modules = list(modules)
    methods = {kind: _methods(kind) for kind in {type(module) for module in modules}}
    reached: set[str] = set()
    left = {"forward"}
    while left:
        reached |= left
        codes = (own[name] for own in methods.values() for name in left & own.keys())
        left = {name for code in codes for name in _names(code)} - reached
    found = {
        kind
        for kind, own in methods.items()
        if any("data" in _names(own[name]) for name in reached & own.keys())
    }
    return [module for module in modules if type(module) in found]


def _methods(kind: type) -> dict[str, CodeType]:
    """Return the code of a class's methods, and of those that it has of others but torch's."""
    found: dict[str, CodeType] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.partition(".")[0] not in {"torch", "builtins"}:
            for name, value in vars(base).items():
                function: Any = inspect.unwrap(value) if callable(value) else value
                if isinstance(function, FunctionType):
                    found[name] = function.__code__
    return found


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names of attributes and globals in a function, and in functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
