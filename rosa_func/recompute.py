"""Gradient checkpointing: the second forward pass computes with the state as the first did."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

_again: ContextVar[Callable[[], AbstractContextManager[object]]] = ContextVar(
    "again", default=nullcontext
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
    return nullcontext(), _again.get()()


class Reparametrized(AbstractContextManager[None]):
    """The model with other weights in it, as often as it is entered."""

    def __init__(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        """Remember both."""
        self._model, self._weights = model, weights

    def __enter__(self) -> None:
        """Put the weights in, as `functional_call` does."""
        self._inner = _reparametrize_module(self._model, self._weights, tie_weights=True)
        self._inner.__enter__()

    def __exit__(self, *raised: object) -> None:
        """Put the model's own weights back."""
        self._inner.__exit__(*raised)  # type: ignore[arg-type]


@contextmanager
def weights_for_backward(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Make the segments that are checkpointed inside compute with these weights again."""
    token = _again.set(lambda: Reparametrized(model, weights))
    try:
        yield
    finally:
        _again.reset(token)


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
