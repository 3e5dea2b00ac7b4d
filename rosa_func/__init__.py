"""Random Orthogonal Subspace Adaptation as pure functions over a TensorDict.

>>> import rosa_func, torch
>>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
>>> state = rosa_func.init(model, r=2)
>>> y = rosa_func.call(model, state, torch.ones(3, 6))
>>> state = rosa_func.resample(state, key=1)
"""

from rosa_func import checkpoint, distributed, export, module, optim, samplers
from rosa_func.cycle import Method, init, merge, method, resample
from rosa_func.forward import adapted, bind, call, compose
from rosa_func.keys import fold_in
from rosa_func.modules import skeleton
from rosa_func.pretrained import init_from
from rosa_func.recomputing import recompute
from rosa_func.trainable import Count, count, named_parameters, parameters

__version__ = "0.1.0"

__all__ = [
    "Count",
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
    "merge",
    "method",
    "module",
    "named_parameters",
    "optim",
    "parameters",
    "recompute",
    "resample",
    "samplers",
    "skeleton",
]
