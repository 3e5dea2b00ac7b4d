"""From a state to the forward pass of a model: compose, call, bind, recompute."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from itertools import chain
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import functional_call

from rosa_func import modules
from rosa_func._torch import own_buffers, own_parameters
from rosa_func.places import Swapped, places, swapped
from rosa_func.weight import Parts, all_composed, read

# The swaps under which a checkpointed segment runs, the innermost last.
_bound: ContextVar[tuple[Swapped, ...]] = ContextVar("bound", default=())


def compose(state: TensorDict) -> dict[str, Tensor]:
    """Return the weights for `torch.func.functional_call`, without forming A B.

    An adapted weight is a tensor that looks like its residual R, of the model's dtype and device,
    and stands for R + A B. `linear`, `addmm`, `matmul`, `bmm`, `embedding`, the convolutions,
    transposes and the indexing of a batch of matrices apply the factors,

        x W = x R + (x A) B,

    and so never form the gradient of W. Whatever else is asked of it forms the dense weight:
    slower, still right; to write to it is an error. Code that torch subclasses cannot follow
    (`torch.jit.script`, `torch.tensor(weight)`, `torch.func.vmap` over it) sees NaN.
    Differentiate with respect to `state["trainable"]`.

    `functional_call` with these weights lets BatchNorm in training mode write to the buffers, which
    the state shares with the model, and puts a module that is registered under two names back
    wrongly; `call` does neither.

    Args:
        state: a state of `init` or `resample`.

    Returns:
        {name: tensor} for every parameter and persistent buffer, tied ones once.

    Raises:
        KeyError: if an entry of the state is missing (named).

    Example:
        >>> import rosa_func, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> state, x = rosa_func.init(model, 2), torch.ones(1, 6)
        >>> y = torch.func.functional_call(model, rosa_func.compose(state), (x,))
        >>> torch.allclose(y, model(x), atol=1e-6)
        True
    """
    return _composed(read(state))


def call(model: nn.Module, state: TensorDict, /, *args: Any, **kwargs: Any) -> Any:
    """Compute model(*args, **kwargs) with the weights of the state; the model is not written to.

    It is `functional_call(model, compose(state), args, kwargs)`, checked: names and shapes must
    fit, and the buffers of modules in training mode (the statistics of BatchNorm) are cloned, so
    that what the forward pass writes to them is dropped.

    With a transformers model under `vmap` or `torch.compile`, return `.logits` and pass
    `use_cache=False`. Dropout under `vmap` needs `vmap(..., randomness="different")` (or
    "same").

    Args:
        model: the model, or its `skeleton`. It may be wrapped by `torch.compile` or DDP where the
            model of the state was not, and the other way round.
        state: a state of `init` or `resample`.
        args: passed on.
        kwargs: passed on.

    Returns:
        Whatever the model returns.

    Raises:
        KeyError: if the state lacks a tensor of the model, or has one of another name.
        ValueError: if a shape differs (both are named), or if the model, in training, uses
            gradient checkpointing without `recompute`.

    Example:
        >>> import rosa_func, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> state, x = rosa_func.init(model, 2), torch.ones(3, 6)
        >>> rosa_func.call(model, state, x).shape
        torch.Size([3, 4])
    """
    if torch.compiler.is_compiling():  # which follows torch's own swap, and keeps no places
        _refuse_wrong_checkpointing(model, model.named_modules())
        return functional_call(model, _in_each_place(model, state), args, kwargs, tie_weights=False)
    swap = _fitted(model, state)
    with _recomputed_in(swap), swap:
        return model(*args, **kwargs)


@contextmanager
def bind(model: nn.Module, state: TensorDict) -> Iterator[nn.Module]:
    """Let the model compute with the state inside a `with` block, by whatever method it has.

    So `generate` works without a merge, and so does code that calls the model itself. Inside,
    the model's parameters are the composed weights; on leaving, also by an exception, they are its
    own again. Not for two threads at once on one model.

    Args:
        model: the model, or its `skeleton`.
        state: a state of `init` or `resample`.

    Yields:
        The model.

    Raises:
        As `call` does.

    Example:
        >>> import rosa_func, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> state, x = rosa_func.init(model, 2), torch.ones(3, 6)
        >>> with rosa_func.bind(model, state) as bound:
        ...     y = bound(x)
        >>> torch.equal(y, rosa_func.call(model, state, x))
        True
    """
    swap = _fitted(model, state)
    with _recomputed_in(swap), swap:
        yield model


def recompute() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """Return the contexts of the two forward passes of a checkpointed segment.

    Gradient checkpointing runs a segment again in the backward pass, after `call` has put the
    model's own weights back. Given as `context_fn`, this puts the composed weights of that call
    back for the second run, so gradients are those without checkpointing. `call` refuses a
    transformers model in training that checkpoints without it. A model that calls
    `torch.utils.checkpoint.checkpoint` itself passes `use_reentrant=False,
    context_fn=rosa_func.recompute` there; outside `call` and `bind` this does nothing.

    Returns:
        A pair of context managers, for `torch.utils.checkpoint.checkpoint`.

    Example:
        >>> import rosa_func
        >>> options = {"use_reentrant": False, "context_fn": rosa_func.recompute}
        >>> model.activation_checkpointing_enable(options)  # doctest: +SKIP

        Before transformers 5.23 that is `model.gradient_checkpointing_enable`.
    """
    return nullcontext(), _All(*(swap.again() for swap in _bound.get()))


def check_fit(model: nn.Module, state: TensorDict) -> dict[str, str]:
    """Return {the model's name: the state's name}, after making sure that the two fit."""
    return _fit(model, _shapes(read(state)))


def _fit(model: nn.Module, shapes: dict[str, torch.Size]) -> dict[str, str]:
    own = {name: tensor.shape for name, tensor in modules.tensors(model).items()}
    return modules.fit(type(model).__name__, own, shapes)


def _composed(parts: Parts) -> dict[str, Tensor]:
    return {**parts.frozen, **all_composed(parts.adapted()), **parts.rounded()}  # type: ignore[dict-item]


def _shapes(parts: Parts) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in (parts.frozen | parts.full).items()}


def _fitted(model: nn.Module, state: TensorDict) -> Swapped:
    """Return the swap of the composed weights, checked."""
    parts, found = read(state), places(model)
    names = modules.fit(type(model).__name__, found.shapes(), _shapes(parts))
    _refuse_wrong_checkpointing(model, ((name, owner()) for name, owner in found.checkpointing))
    return swapped(found, names, _composed(parts))


def _in_each_place(model: nn.Module, state: TensorDict) -> dict[str, Tensor]:
    """Return what `_fitted` swaps by the names of all places, for torch's own swap.

    A module that is in two places is listed once. Torch, left to find the ties, would swap its
    weights twice, and put back those of the first swap after the second.
    """
    weights = compose(state)
    names = _fit(model, {name: weight.shape for name, weight in weights.items()})
    both = chain(model.named_parameters(), modules.persistent_buffers(model))
    by_tensor = {id(tensor): weights[names[name]] for name, tensor in both}
    for module in model.modules():
        for buffer in module.buffers(recurse=False) if module.training else ():
            by_tensor[id(buffer)] = by_tensor.get(id(buffer), buffer).clone()
    placed = {}
    for prefix, module in model.named_modules():
        for key, tensor in chain(own_parameters(module).items(), own_buffers(module).items()):
            if tensor is not None and id(tensor) in by_tensor:
                placed[f"{prefix}.{key}" if prefix else key] = by_tensor[id(tensor)]
    return placed


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
def _recomputed_in(swap: Swapped) -> Iterator[None]:
    """Make the segments that are checkpointed inside compute in this swap again."""
    token = _bound.set((*_bound.get(), swap))
    try:
        yield
    finally:
        _bound.reset(token)


def _refuse_wrong_checkpointing(model: nn.Module, named_modules: Iterable[tuple[str, Any]]) -> None:
    """Refuse a transformers model that checkpoints so that its gradients would be wrong."""
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
