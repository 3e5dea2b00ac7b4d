"""Which copies of a module may be averages of its weights."""

from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from rosa_func._torch import version

_copies: "WeakKeyDictionary[nn.Module, WeakSet[nn.Module]]" = WeakKeyDictionary()


def remember(module: nn.Module, copy: nn.Module) -> None:
    """Remember a copy, whose parameters nobody has written to so far."""
    _copies.setdefault(module, WeakSet()).add(copy)


def have_begun(module: nn.Module) -> bool:
    """Return whether a copy was written to, and has no gradients of its own.

    Torch's `AveragedModel` is such a copy from its first update on.
    """
    return any(
        parameter.grad is None and version(parameter) > 0
        for copy in _copies.get(module, ())
        for parameter in copy.parameters()
    )
