"""From a state to the model's weights: composed weights, `call`, and weightless copies."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import functional_call

from rosa_func import layout, targets
from rosa_func.composed import composed
from rosa_func.recompute import (
    Reparametrized,
    refuse_wrong_checkpointing,
    weights_for_backward,
)


def compose(state: TensorDict) -> dict[str, Tensor]:
    """Return the weights for `torch.func.functional_call`, without forming A B.

    An adapted weight is a tensor that looks like its residual R, of the model's dtype and device,
    and stands for R + A B. `linear`, `addmm`, `matmul`, `embedding`, the convolutions and
    transposes apply the factors,

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
    adapted = set(layout.check(state))
    weights = dict(state["frozen"].items())
    for name, value in state["trainable"].items():
        if name in adapted:
            weights[name] = composed(weights[name], value["A"], value["B"])
        else:
            weights[name] = value
    return weights


def call(model: nn.Module, state: TensorDict, /, *args: Any, **kwargs: Any) -> Any:
    """Compute model(*args, **kwargs) with the weights of the state; the model is not written to.

    It is `functional_call(model, compose(state), args, kwargs)`, checked: names and shapes must
    fit, and the buffers of modules in training mode (the statistics of BatchNorm) are cloned, so
    that what the forward pass writes to them is dropped.

    With a transformers model under `vmap` or `torch.compile`, return `.logits` and pass
    `use_cache=False`. Dropout under `vmap` needs `vmap(..., randomness="different")` (or
    "same").

    Args:
        model: the model, or its `skeleton`.
        state: a state of `init` or `resample`.
        args: passed on.
        kwargs: passed on.

    Returns:
        Whatever the model returns.

    Raises:
        KeyError: if the state lacks a tensor of the model, or has one that the model has not.
        ValueError: if a shape differs (both are named), or if the model, in training, uses
            gradient checkpointing without `recompute`.

    Example:
        >>> import rosa_func, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> state, x = rosa_func.init(model, 2), torch.ones(3, 6)
        >>> rosa_func.call(model, state, x).shape
        torch.Size([3, 4])
    """
    weights = _fitted(model, state)
    refuse_wrong_checkpointing(model)
    if torch.compiler.is_compiling():  # which has no second forward pass in Python
        return functional_call(model, weights, args, kwargs, tie_weights=False)
    with weights_for_backward(model, weights):
        return functional_call(model, weights, args, kwargs, tie_weights=False)


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
    weights = _fitted(model, state)
    refuse_wrong_checkpointing(model)
    with weights_for_backward(model, weights), Reparametrized((model, weights)):
        yield model


def _fitted(model: nn.Module, state: TensorDict) -> dict[str, Tensor]:
    """Return the composed weights, checked, with the buffers that a forward pass may write to.

    Tied ones come in each place, and a module that is in two places itself counts as one place:
    left to find the ties, torch would swap its weights twice, and the second time put back the
    first time's.
    """
    weights = compose(state)
    check_fit(model, weights)
    both = chain(model.named_parameters(), targets.persistent_buffers(model))
    by_tensor = {id(tensor): weights[name] for name, tensor in both}
    for module in model.modules():
        for buffer in module.buffers(recurse=False) if module.training else ():
            by_tensor[id(buffer)] = by_tensor.get(id(buffer), buffer).clone()
    placed = {}
    for prefix, module in model.named_modules():
        for name, tensor in chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None and id(tensor) in by_tensor:
                placed[f"{prefix}.{name}" if prefix else name] = by_tensor[id(tensor)]
    return placed


def skeleton(model: nn.Module) -> nn.Module:
    """Return a weightless copy of the model, so that the model can be let go.

    Its parameters and persistent buffers are on the meta device, ties kept; non-persistent
    buffers, which no state holds, are real. `call(skeleton(model), state, ...)` equals
    `call(model, state, ...)` bit for bit.

    Args:
        model: any `nn.Module`.

    Returns:
        A module of the same class. To compute with it, pass it to `call` with a state.

    Example:
        >>> import rosa_func, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> state, x = rosa_func.init(model, 2), torch.ones(3, 6)
        >>> y = rosa_func.call(model, state, x)
        >>> model = rosa_func.skeleton(model)
        >>> torch.equal(rosa_func.call(model, state, x), y)
        True
    """
    # deepcopy takes what the memo holds instead of copying it: no weight is ever copied, and one
    # stand-in for a tensor under several names keeps the tie.
    stand_ins: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()
    }
    for _, buffer in targets.persistent_buffers(model):
        stand_ins[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, stand_ins)


def check_fit(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Make sure that the weights have the names and shapes of the model's."""
    expected = targets.tensors(model)
    if missing := [name for name in expected if name not in weights]:
        raise KeyError(
            f"the state lacks {missing[0]} of {type(model).__name__}; was it made from this model?"
        )
    if unknown := [name for name in weights if name not in expected]:
        raise KeyError(
            f"the state has {unknown[0]}, which {type(model).__name__} has not; "
            "was it made from this model?"
        )
    for name, tensor in expected.items():
        if tensor.shape != weights[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(weights[name].shape)} in the state and "
                f"{tuple(tensor.shape)} in {type(model).__name__}"
            )
