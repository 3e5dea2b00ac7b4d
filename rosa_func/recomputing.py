"""Gradient checkpointing in a model whose weights are swapped for a while."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from rosa_func.places import Swapped

# The swaps under which a checkpointed segment runs, the innermost last.
_bound: ContextVar[tuple[Swapped, ...]] = ContextVar("bound", default=())


def recompute() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """Return the contexts of the two forward passes of a checkpointed segment.

    Gradient checkpointing runs a segment again in the backward pass, when `bind` has long put the
    model's own weights back. Given as `context_fn`, this puts the composed weights of that block
    back for the second run, so gradients are those without checkpointing. `bind` refuses a
    transformers model in training that checkpoints without it. A model that calls
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
    return nullcontext(), _All(*(swap.again() for swap in _bound.get()))


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
