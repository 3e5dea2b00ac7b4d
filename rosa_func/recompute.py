"""Gradient checkpointing: the second forward pass computes with the state as the first did."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

# The models that compute with other weights where a segment is checkpointed, the innermost last.
_bound: ContextVar[tuple[tuple[nn.Module, dict[str, Tensor]], ...]] = ContextVar(
    "bound", default=()
)


def recompute() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """Return the contexts of the two forward passes of a checkpointed segment.

    Gradient checkpointing runs a segment again in the backward pass, when `call` has long put the
    model's own weights back. Given as `context_fn`, this puts the composed weights of that call in
    their place once more, and gradients are those without checkpointing. `call` refuses a
    transformers model in training that checkpoints without it. A model that calls
    `torch.utils.checkpoint.checkpoint` itself passes `use_reentrant=False,
    context_fn=rosa_func.recompute` there; outside `call` and `bind` this does nothing.

    Returns:
        A pair of context managers, for `torch.utils.checkpoint.checkpoint`.

    Example:
        >>> import rosa_func
        >>> options = {"use_reentrant": False, "context_fn": rosa_func.recompute}
        >>> model.activation_checkpointing_enable(options)  # doctest: +SKIP
    """
    return nullcontext(), Reparametrized(*_bound.get())


class Reparametrized(AbstractContextManager[None]):
    """Models with other weights in them, in each place one, as often as it is entered."""

    def __init__(self, *pairs: tuple[nn.Module, dict[str, Tensor]]) -> None:
        """Remember the models and their weights."""
        self._pairs = pairs

    def __enter__(self) -> None:
        """Put the weights in, as `functional_call` does."""
        self._stack = ExitStack()
        for model, weights in self._pairs:
            self._stack.enter_context(_reparametrize_module(model, weights))

    def __exit__(self, *raised: object) -> None:
        """Put the models' own weights back."""
        self._stack.close()


@contextmanager
def weights_for_backward(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Make the segments that are checkpointed inside compute with these weights again."""
    token = _bound.set((*_bound.get(), (model, weights)))
    try:
        yield
    finally:
        _bound.reset(token)


def refuse_wrong_checkpointing(model: nn.Module) -> None:
    """Refuse a transformers model that checkpoints so that its gradients would be wrong."""
    if not torch.is_grad_enabled():
        return
    for name, module in model.named_modules():
        if not (module.training and getattr(module, "gradient_checkpointing", False) is True):
            continue
        function = getattr(module, "_gradient_checkpointing_func", None)
        options = getattr(function, "keywords", {})
        if options.get("use_reentrant", True) or options.get("context_fn") is not recompute:
            given = {key: options.get(key) for key in ("use_reentrant", "context_fn")}
            raise ValueError(
                f"{name or type(model).__name__} uses gradient checkpointing with {given}, which "
                "would recompute with the model's own weights; enable it by "
                "model.activation_checkpointing_enable("
                '{"use_reentrant": False, "context_fn": rosa_func.recompute})'
            )
