"""Gradient checkpointing in a model whose weights are swapped for a while."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from rosa_func.places import Swapped

# The swaps under which a checkpointed segment runs, the innermost last.
_bound: ContextVar[tuple[Swapped, ...]] = ContextVar("bound", default=())
# How many checkpointed segments, one inside the other, were given `recompute`.
_known: ContextVar[int] = ContextVar("known", default=0)


def recompute() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """Return the contexts of the two forward passes of a checkpointed segment.

    Gradient checkpointing runs a segment again in the backward pass, when `bind` has long put the
    model's own weights back. Given as `context_fn`, this puts the composed weights of that block
    back for the second run, so gradients are those without checkpointing. `bind` refuses a model
    in training that checkpoints without it. A model that calls
    `torch.utils.checkpoint.checkpoint` itself passes `use_reentrant=False,
    context_fn=rosa_func.recompute` there. `call` and `adapted` need none of this, except for a
    model that cannot be copied (see `adapted`); elsewhere this does nothing.

    Returns:
        A pair of context managers, for `torch.utils.checkpoint.checkpoint`.

    Example:
        >>> import rosa_func
        >>> options = {"use_reentrant": False, "context_fn": rosa_func.recompute}
        >>> model.activation_checkpointing_enable(options)  # doctest: +SKIP

        Before transformers 5.23 that is `model.gradient_checkpointing_enable`.
    """
    return _Known(), _All(*(swap.again() for swap in _bound.get()))


class _Known(AbstractContextManager[None]):
    """The first run of a segment that was given `recompute`."""

    def __enter__(self) -> None:
        self._token = _known.set(_known.get() + 1)

    def __exit__(self, *raised: object) -> None:
        _known.reset(self._token)


class _All(AbstractContextManager[None]):
    """Several contexts, one inside the other, which can be entered again."""

    def __init__(self, *contexts: AbstractContextManager[None]) -> None:
        self._contexts = contexts

    def __enter__(self) -> None:
        self._stack = ExitStack()
        for context in self._contexts:
            self._stack.enter_context(context)

    def __exit__(self, *raised: object) -> None:
        self._stack.close()


@contextmanager
def recomputed_in(swap: Swapped) -> Iterator[None]:
    """Make the segments that are checkpointed inside compute in this swap again."""
    token = _bound.set((*_bound.get(), swap))
    try:
        yield
    finally:
        _bound.reset(token)


@contextmanager
def refusing_recomputation(model: nn.Module, owners: Iterable[nn.Module]) -> Iterator[None]:
    """Refuse forward passes of these modules in a segment that would be recomputed wrongly.

    Torch says of no segment beforehand that it will run it again, so the callers are looked at.
    """

    def look(module: nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling() or _segments() <= _known.get():
            return
        name = next((name for name, one in model.named_modules() if one is module), "")
        raise ValueError(
            f"{name or type(model).__name__} runs inside torch.utils.checkpoint, which would "
            "recompute it with the model's own weights: use rosa_func.call or adapted in the place "
            "of bind, or pass use_reentrant=False, context_fn=rosa_func.recompute to checkpoint"
        )

    with ExitStack() as stack:
        for owner in owners:
            stack.callback(owner.register_forward_pre_hook(look).remove)
        yield


def _segments() -> int:
    """Return how many calls of torch.utils.checkpoint.checkpoint run now."""
    count, frame = 0, inspect.currentframe()
    while frame is not None:
        code, frame = frame.f_code, frame.f_back
        count += code.co_name == "checkpoint" and code.co_filename == _FILE
    return count


_FILE = torch.utils.checkpoint.__file__


def refuse_wrong_checkpointing(model: nn.Module, named_modules: Iterable[tuple[str, Any]]) -> None:
    """Refuse a transformers model whose recomputation a swap would make wrong."""
    if not torch.is_grad_enabled():
        return
    for name, module in named_modules:
        if not (module.training and getattr(module, "gradient_checkpointing", False) is True):
            continue
        function = getattr(module, "_gradient_checkpointing_func", None)
        options = getattr(function, "keywords", {})
        if options.get("use_reentrant", True) or options.get("context_fn") is not recompute:
            named = hasattr(model, "activation_checkpointing_enable")
            switch = f"{'activation' if named else 'gradient'}_checkpointing_enable"
            given = {key: options.get(key) for key in ("use_reentrant", "context_fn")}
            raise ValueError(
                f"{name or type(model).__name__} uses gradient checkpointing with {given}, which "
                "would recompute with the model's own weights; enable it by "
                f"model.{switch}("
                '{"use_reentrant": False, "context_fn": rosa_func.recompute})'
            )
