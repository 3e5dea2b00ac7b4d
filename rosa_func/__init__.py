"""Random Orthogonal Subspace Adaptation as pure functions over a TensorDict.

>>> import rosa_func, torch
>>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
>>> state = rosa_func.init(model, r=2)
>>> y = rosa_func.call(model, state, torch.ones(3, 6))
>>> state = rosa_func.resample(state, key=1)
"""

from rosa_func import checkpoint, distributed, export, module, optim, samplers
from rosa_func.compose import bind, call, compose, skeleton
from rosa_func.count import Count, count
from rosa_func.keys import fold_in
from rosa_func.leaves import named_parameters, parameters
from rosa_func.loading import init_from
from rosa_func.method import Method, method
from rosa_func.recompute import recompute
from rosa_func.state import init, merge, resample

__version__ = "0.1.0"

__all__ = [
    "Count",
    "Method",
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
