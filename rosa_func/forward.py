"""From a state to the forward pass of a model: compose, call, adapted, bind."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import functional_call

from rosa_func import modules
from rosa_func._torch import (
    are_transforms_off,
    is_compiled,
    is_eager,
    own_buffers,
    own_parameters,
    version,
)
from rosa_func.places import Places, places, standing, swapped
from rosa_func.recomputing import (
    recomputed_in,
    refuse_wrong_checkpointing,
    refusing_recomputation,
)
from rosa_func.weight import Parts, all_composed, read
from rosa_func.weight.composed import as_dense, refuse_tracing
from rosa_func.weight.gathering import is_sharded

_locks: "WeakKeyDictionary[nn.Module, Any]" = WeakKeyDictionary()


def compose(state: TensorDict) -> dict[str, Tensor]:
    """Return the weights for `torch.func.functional_call`, without forming A B.

    An adapted weight is a tensor that looks like its residual R, of the model's dtype and device,
    and stands for R + A B. `linear`, `addmm`, `matmul`, `bmm`, `embedding`, the convolutions,
    transposes and the indexing of a batch of matrices apply the factors,

        x W = x R + (x A) B,

    and so never form the gradient of W. Whatever else is asked of it forms the dense weight:
    slower, still right; to write to it is an error.
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

    It is `functional_call(model, compose(state), args, kwargs)`, checked, and on a copy of the
    model's modules (see `adapted`): several threads may call one model, and what the forward pass
    writes to buffers (the statistics of BatchNorm) or sets as attributes is dropped. To write to a
    frozen parameter is an error afterwards, and to an adapted one at once. Torch does not count
    `weight.data.clamp_()`: modules whose methods name `.data` are given copies, so that it is
    dropped too; in a function outside of a module's class it is not seen, and reaches a frozen one.

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
        RuntimeError: if the forward pass wrote to a frozen parameter (named).
        ValueError: if a shape differs (both are named); if the model cannot be copied and uses
            gradient checkpointing, in training, without `recompute`.

    Example:
        >>> import rosa_func, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> state, x = rosa_func.init(model, 2), torch.ones(3, 6)
        >>> rosa_func.call(model, state, x).shape
        torch.Size([3, 4])
    """
    return called(model, state, args, kwargs)[0]


def called(
    model: nn.Module, state: TensorDict, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, list[Tensor]]:
    """Return what `call` returns, and the buffers as the forward pass left them.

    They are in the order of `places(model).buffers`; a compiler keeps none.
    """
    if torch.compiler.is_compiling():  # which follows torch's own swap, and keeps no places
        refuse_wrong_checkpointing(model, model.named_modules())
        placed = _in_each_place(model, state)
        return functional_call(model, placed, args, kwargs, tie_weights=False), []
    with _alone(model):
        found, names, weights, views = _fitted(model, _parts(state))
        if "labels" in kwargs:
            _warn_if_nothing_trains(model, weights)
        copies = standing(found, names, weights)
        if copies is None:
            with _unwritten(views), _bound(model, found, names, weights):
                return model(*args, **kwargs), found.left_in(found.owners())
    with _unwritten(views):
        return copies[0](*args, **kwargs), found.left_in(copies)


def adapted(model: nn.Module, state: TensorDict) -> nn.Module:
    """Return the model with the weights of the state, to be used by whatever method it has.

    Its modules are copies that share everything but tensors and children with those of the model,
    which is not written to. Its parameters are composed weights (see `compose`), of the values that
    the state had: after an optimizer's step or a resample take another, which costs less than a
    forward pass.

    Args:
        model: the model, or its `skeleton`.
        state: a state of `init` or `resample`.

    Returns:
        A module of the model's class.

    Raises:
        KeyError, ValueError: as `call` does.
        TypeError: if modules of the model lead to each other in a way that a copy cannot follow,
            such as a function that closes over one (`torch.compile` makes these). `call` and
            `bind` swap the tensors of such a model for a while, one thread at a time.

    Example:
        >>> import rosa_func, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> state, x = rosa_func.init(model, 2), torch.ones(3, 6)
        >>> y = rosa_func.adapted(model, state)(x)
        >>> torch.equal(y, rosa_func.call(model, state, x))
        True
    """
    with _alone(model):
        found, names, weights, _ = _fitted(model, _parts(state))
        copies = standing(found, names, weights)
    if copies is None:
        raise TypeError(
            f"the modules of {type(model).__name__} lead to each other in a way that a copy cannot "
            "follow (a function that closes over one, a compiled or scripted module): use bind"
        )
    return copies[0]


@contextmanager
def bind(model: nn.Module, state: TensorDict) -> Iterator[nn.Module]:
    """Let the model compute with the state inside a `with` block, by whatever method it has.

    It is for code that calls the model itself; elsewhere `adapted` is simpler. Inside, the model's
    parameters are the composed weights; on leaving, also by an exception, they are its own again,
    and a generator that was begun inside goes on with these. Not for two threads at once on one
    model.

    Args:
        model: the model, or its `skeleton`.
        state: a state of `init` or `resample`.

    Yields:
        The model.

    Raises:
        KeyError, ValueError: as `call` does; and if the model, in training, uses gradient
            checkpointing without `recompute`: transformers', or torch.utils.checkpoint itself.

    Example:
        >>> import rosa_func, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> state, x = rosa_func.init(model, 2), torch.ones(3, 6)
        >>> with rosa_func.bind(model, state) as bound:
        ...     y = bound(x)
        >>> torch.equal(y, rosa_func.call(model, state, x))
        True
    """
    found, names, weights, _ = _fitted(model, _parts(state))
    with _bound(model, found, names, weights):
        yield model


@contextmanager
def computing_with(model: nn.Module, parts: Parts) -> Iterator[nn.Module]:
    """Yield the model with these weights: a copy as of `adapted`, else itself as in `bind`."""
    with _alone(model):
        found, names, weights, views = _fitted(model, parts)
        copies = standing(found, names, weights)
        if copies is None:
            with _unwritten(views), _bound(model, found, names, weights):
                yield model
            return
    with _unwritten(views):
        yield copies[0]


def check_fit(model: nn.Module, state: TensorDict) -> dict[str, str]:
    """Return {the model's name: the state's name}, after making sure that the two fit."""
    return _fit(model, _shapes(read(state)))


def _fit(model: nn.Module, shapes: dict[str, torch.Size]) -> dict[str, str]:
    own = {name: tensor.shape for name, tensor in modules.own_tensors(model).items()}
    return modules.fit(type(model).__name__, own, shapes)


def _composed(parts: Parts) -> dict[str, Tensor]:
    return {**parts.frozen, **all_composed(parts.composable()), **parts.rounded()}  # type: ignore[dict-item]


def _shapes(parts: Parts) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in (parts.frozen | parts.full).items()}


def _parts(state: TensorDict) -> Parts:
    refuse_tracing()  # which reads shapes in a way of its own
    return read(state)


def _fitted(
    model: nn.Module, parts: Parts
) -> tuple[Places, dict[str, str], dict[str, Tensor], dict[str, Tensor]]:
    """Return the model's places, its names in the state, the weights, and the frozen of these.

    Frozen tensors are views, so that the model's code may give them other data. What it may write
    to through `.data` is cloned, since torch would not count it.
    """
    found = places(model)
    names = modules.fit(type(model).__name__, found.shapes(), _shapes(parts))
    cloned = {names[name] for name in found.uncounted}
    views = {
        name: t.clone() if name in cloned else t.view_as(t)
        for name, t in parts.frozen.items()
        if isinstance(t, Tensor) and not is_sharded(t)
    }
    weights = _composed(parts) | views
    weights |= {name: weights[name].clone() for name in cloned & parts.full.keys()}
    return found, names, weights, views


@contextmanager
def _unwritten(tensors: dict[str, Tensor]) -> Iterator[None]:
    """Raise if a forward pass wrote to one of these, as far as torch counts that."""
    before = [version(tensor) for tensor in tensors.values()] if is_eager() else []
    yield
    for count, (name, tensor) in zip(before, tensors.items(), strict=False):
        if version(tensor) != count:
            raise RuntimeError(
                f"the forward pass wrote to {name}, which the state and the model share: let it "
                "write to a copy, or put the tensor into `train`"
            )


@contextmanager
def _bound(
    model: nn.Module, found: Places, names: dict[str, str], weights: dict[str, Tensor]
) -> Iterator[None]:
    """Swap the model's tensors for a while; arguments as of `swapped`.

    A compiler that works inside a transform of torch.func does not follow composed weights.
    """
    owners = found.owners()
    refuse_wrong_checkpointing(
        model, [(name, owners[index]) for name, index in found.checkpointing]
    )
    compiled = any(map(is_compiled, owners))
    if compiled and not are_transforms_off():
        weights = {name: as_dense(weight) for name, weight in weights.items()}
    swap = swapped(found, names, weights)
    watched = {slot.owner for slot in found.slots if not slot.is_buffer}
    if compiled or not (model.training and torch.is_grad_enabled()):
        watched = set()
    with recomputed_in(swap), swap, refusing_recomputation(model, [owners[i] for i in watched]):
        yield


def _warn_if_nothing_trains(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Warn of a loss that no gradient flows through, where a model in training is given labels."""
    is_in_training = model.training and torch.is_grad_enabled() and is_eager()
    if is_in_training and not any(weight.requires_grad for weight in weights.values()):
        warnings.warn(
            "the model is in training and was given labels, but no leaf of the state requires a "
            "gradient: rosa_func.parameters(state) switches them on, and after a resample "
            "optim.rebind does (for a loss without gradients, use torch.no_grad)",
            stacklevel=4,
        )


def _alone(model: nn.Module) -> AbstractContextManager[object]:
    """Return the lock of a model: while one thread swaps its tensors, no other looks at them."""
    if not isinstance(model, nn.Module):
        return nullcontext()  # `places` says what is wrong
    lock: AbstractContextManager[object] = _locks.setdefault(model, RLock())
    return lock


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
        for buffer in module.buffers(recurse=False):
            by_tensor[id(buffer)] = by_tensor.get(id(buffer), buffer).clone()
    placed = {}
    for prefix, module in model.named_modules():
        for key, tensor in chain(own_parameters(module).items(), own_buffers(module).items()):
            if tensor is not None and id(tensor) in by_tensor:
                placed[f"{prefix}.{key}" if prefix else key] = by_tensor[id(tensor)]
    return placed
