"""Random Orthogonal Subspace Adaptation as pure functions over a TensorDict.

A state holds each adapted weight W as a frozen residual R and a trainable product A B:

>>> import rosa_func, torch
>>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
>>> state = rosa_func.init(model, r=2)  # W = R + A B; the model is only read
>>> y = rosa_func.call(model, state, torch.ones(3, 6))  # the model's forward pass with the state
>>> optimizer = torch.optim.AdamW(rosa_func.parameters(state), weight_decay=0.0)
>>> new = rosa_func.resample(state, key=1)  # the same function in new random subspaces
>>> optimizer = rosa_func.optim.rebind(optimizer, state, new)
>>> weights = rosa_func.merge(new)  # dense, for model.load_state_dict

Begin with: init, init_from, resample, merge, method; plan says what it will cost.
To compute: call, adapted, bind, compose, recompute, skeleton.
To train:   parameters, named_parameters, count, fold_in.
To place:   keep_compensation, of what rounding took from 16-bit weights.

More is in rooms, each imported when it is first asked for, as rosa_func.optim:

samplers     how A and B are drawn: ROSA, PiSSA, MiLoRA, LoRA and others
sparse       robust adaptation: a sparse part beside A B, on a support chosen by gradients
stacking     several states as one: a sweep at once by vmap, each row of a batch with its own
optim        groups with rates of their own; an optimizer that survives a resample
checkpoint   states and runs in safetensors files; the change alone
export       to plain modules, and to and from adapters of peft
module       a state as an nn.Module, for the Trainer and DistributedDataParallel
trainer      resampling and robust adaptation as callbacks of the Trainer (the extra "trainer")
quantised    residuals in 4 or 8 bits a value: the merges of these, each with its error
distributed  frozen weights spread over several processes; a resample, a support shared by them
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from rosa_func.binding import Method, method
from rosa_func.cycle import merge, resample
from rosa_func.forward import adapted, bind, call, compose
from rosa_func.keys import fold_in
from rosa_func.modules import skeleton
from rosa_func.planning import MemoryPlan, plan
from rosa_func.pretrained import init_from
from rosa_func.recomputing import recompute
from rosa_func.starting import init
from rosa_func.storage import keep_compensation
from rosa_func.trainable import Count, count, named_parameters, parameters

if TYPE_CHECKING:
    from rosa_func import checkpoint, distributed, export, module, optim, quantised, samplers
    from rosa_func import sparse as sparse
    from rosa_func import stacking as stacking
    from rosa_func import trainer as trainer

__version__ = "0.1.0"

# Without the trainer, so that `from rosa_func import *` needs no extra.
__all__ = [
    "Count",
    "MemoryPlan",
    "Method",
    "adapted",
    "bind",
    "call",
    "checkpoint",
    "compose",
    "count",
    "distributed",
    "export",
    "fold_in",
    "init",
    "init_from",
    "keep_compensation",
    "merge",
    "method",
    "module",
    "named_parameters",
    "optim",
    "parameters",
    "plan",
    "quantised",
    "recompute",
    "resample",
    "samplers",
    "skeleton",
    "sparse",
    "stacking",
]

_ROOMS = {
    *("checkpoint", "distributed", "export", "module", "optim", "quantised", "samplers"),
    *("sparse", "stacking", "trainer"),
}

if not TYPE_CHECKING:  # or a type checker would take any name for one of ours

    def __getattr__(name: str) -> ModuleType:
        """Import a room when it is first asked for."""
        if name in _ROOMS:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        """List the rooms that are not imported yet, too."""
        return sorted({*globals(), *__all__})
