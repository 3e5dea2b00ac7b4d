"""Out to plain modules and to peft adapters, and in from them."""

import copy
from typing import Any

from tensordict import TensorDict
from torch import nn

from rosa_func import state as states
from rosa_func import targets as targeting
from rosa_func.adapters import from_peft, to_peft
from rosa_func.compose import check_fit, compose

__all__ = ["from_peft", "to_module", "to_peft"]


def to_module(model: nn.Module, state: TensorDict) -> nn.Module:
    """Return a new plain module of the same class with the merged weights.

    It shares no memory with the model or the state, has the ties of the model, and is all that
    `save_pretrained` or `generate` need.

    Args:
        model: the model, or its `skeleton`; it is not written to.
        state: a state of `init` or `resample`.

    Returns:
        A module with the weights of `merge(state)`, in the model's mode.

    Raises:
        KeyError, ValueError: if model and state do not fit, as in `call`.

    Example:
        >>> import rosa_func, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> state, x = rosa_func.init(model, 2), torch.ones(3, 6)
        >>> merged = rosa_func.export.to_module(model, state)
        >>> torch.allclose(merged(x), rosa_func.call(model, state, x), atol=1e-6)
        True
    """
    check_fit(model, compose(state))
    merged = states.merge(state)
    stand_ins: dict[int, Any] = {
        id(p): nn.Parameter(merged[name].clone(), p.requires_grad)
        for name, p in model.named_parameters()
    }
    for name, buffer in targeting.persistent_buffers(model):
        stand_ins[id(buffer)] = merged[name].clone()
    # deepcopy takes what the memo holds: one parameter for all names of a tied one.
    return copy.deepcopy(model, stand_ins)
