"""A resample that several processes share, for DistributedDataParallel."""

from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor

from rosa_func import layout, samplers, tree
from rosa_func import state as states
from rosa_func.samplers import Sampler


def resample(
    state: TensorDict,
    key: int,
    *,
    sampler: Sampler = samplers.random,
    group: dist.ProcessGroup | None = None,
) -> TensorDict:
    """Do `resample` in all processes of a group, each decomposing its share of the weights.

    Every weight draws from the key and its name, so nobody need say what was drawn; the process
    that decomposed a weight sends its residual and factors to the others. States that were the
    same bits everywhere are so afterwards, also on machines whose BLAS differ.

    Args:
        state: the state, the same in every process.
        key: as in `resample`, the same in every process.
        sampler: as in `resample`.
        group: None for all processes. Without torch.distributed initialised, or alone in the group,
            this is `resample`.

    Returns:
        A new state, as of `resample`.

    Raises:
        As `resample`, in the process whose share it is; the others raise a RuntimeError then, so
        that none waits for ever.

    Example:
        >>> import rosa_func, torch
        >>> state = rosa_func.init(torch.nn.Sequential(torch.nn.Linear(6, 4)), 2)
        >>> new = rosa_func.distributed.resample(state, 1)
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return states.resample(state, key, sampler=sampler)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    adapted = layout.check(state)
    failure: Exception | None = None
    own = TensorDict()
    try:
        own = states.resample(_only(state, adapted[rank::size]), key, sampler=sampler)
    except Exception as error:  # the others wait for a word
        failure = error
    failed = torch.tensor(int(failure is not None), device=state["frozen", adapted[0]].device)
    dist.all_reduce(failed, dist.ReduceOp.MAX, group)
    if failed.item():
        raise failure or RuntimeError(f"another process could not resample; this is rank {rank}")
    new = state.copy()  # the same tensors in a TensorDict of its own
    for name, value in state["trainable"].items():
        if isinstance(value, Tensor):
            new["trainable", name] = value.detach().clone()
    for place, name in enumerate(adapted):
        owner = place % size
        source = owner if group is None else dist.get_global_rank(group, owner)
        for path in _paths(state, name):
            if owner == rank:
                new[path] = own[path].contiguous()
            else:
                new[path] = torch.empty_like(
                    state[path].detach(), memory_format=torch.contiguous_format
                )
            dist.broadcast(new[path], source, group)
    return new


def check_equal(state: TensorDict, group: dist.ProcessGroup | None = None) -> str:
    """Make sure that all processes have the same state, bit for bit, and return its hash.

    Args:
        state: the state of this process.
        group: None for all processes.

    Returns:
        A SHA-256 of names, dtypes, shapes and bytes, in hexadecimal.

    Raises:
        RuntimeError: in every process, if the hashes differ (with all of them).

    Example:
        >>> import rosa_func, torch
        >>> state = rosa_func.init(torch.nn.Sequential(torch.nn.Linear(6, 4)), 2)
        >>> len(rosa_func.distributed.check_equal(state))
        64
    """
    own = tree.digest({}, {str(path): state[path] for path in state.keys(True, True)})
    if not dist.is_available() or not dist.is_initialized():
        return own
    hashes: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(hashes, own, group)
    if len(set(hashes)) > 1:
        raise RuntimeError(f"the processes have different states, by rank: {hashes}")
    return own


def _paths(state: TensorDict, name: str) -> list[tuple[str, ...]]:
    """Return where the parts of an adapted weight are."""
    paths = [("frozen", name), ("trainable", name, "A"), ("trainable", name, "B")]
    kept = "compensation" in state.keys() and name in state["compensation"].keys()
    return [*paths, ("compensation", name)] if kept else paths


def _only(state: TensorDict, names: list[str]) -> TensorDict:
    """Return the state of some adapted weights alone."""
    parts: dict[str, Any] = dict(state.items())
    return TensorDict(
        {
            part: TensorDict({name: entries[name] for name in names if name in entries.keys()})
            for part, entries in parts.items()
        }
    )
