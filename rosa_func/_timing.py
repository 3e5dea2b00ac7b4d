"""The time of a resample, by that of draws of smaller weights."""

from collections import Counter
from time import thread_time

import torch
from torch import nn

from rosa_func import keys, modules
from rosa_func.samplers import Sampler, Site
from rosa_func.targeting import Plan
from rosa_func.weight.parallel import HOST, map_weights

_TIMED = 512  # the side of the largest weight that is drawn to see how long it takes


def resample_seconds(model: nn.Module, plan: Plan, sampler: Sampler) -> float:
    """Return the time of a draw of all weights, by that of one of each shape, made smaller.

    That of a decomposition grows with the third power of the size.
    """
    shapes = {name: tensor.shape for name, tensor in modules.tensors(model).items()}
    each = Counter((shapes[name], target) for name, target in plan.adapted.items())
    seconds = 0.0
    for (shape, (r, input_dim)), count in each.items():
        lead, m, n = shape[:-2], *shape[-2:]
        if input_dim >= 0:
            lead, m, n = shape[:0], shape[0], shape[1:].numel()
        scale = min(1.0, _TIMED / min(m, n))
        rows, columns = max(1, round(m * scale)), max(1, round(n * scale))
        seconds += _draw_seconds(rows, columns, min(r, rows, columns), input_dim % 2, sampler) * (
            count * lead.numel() / scale**3
        )
    return seconds / torch.get_num_threads()


def _draw_seconds(m: int, n: int, r: int, input_dim: int, sampler: Sampler) -> float:
    """Return the processor time of one draw on one thread."""
    W = torch.randn(m, n, generator=keys.generator(0, "plan", ""))

    def timed(_: int) -> float:
        site = Site("weight", input_dim, keys.generator(0, "plan", ""))
        start = thread_time()
        sampler(W, r, site)
        return thread_time() - start

    return min(seconds for _ in range(3) for seconds in map_weights(timed, {0: HOST}))
