"""What several processes do to one state, for DistributedDataParallel."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor, nn

from rosa_func import cycle, samplers, sparse
from rosa_func._supports import Density
from rosa_func._together import all_told, broadcast, description, refuse_different
from rosa_func.checkpoint import digest
from rosa_func.drawing import check_draw
from rosa_func.samplers import Sampler
from rosa_func.weight import Parts, Weight, read, write
from rosa_func.weight.donating import APART, Handover, handing_over
from rosa_func.weight.keeping import kept_as
from rosa_func.weight.layout import Path, entries, from_entries, is_compensation, is_drawn
from rosa_func.weight.sparse_part import sparse_parts

Entries = dict[Path, Tensor]


def resample(
    state: TensorDict,
    key: int,
    *,
    sampler: Sampler = samplers.random,
    group: dist.ProcessGroup | None = None,
    donate: bool = False,
) -> TensorDict:
    """Do `resample` in all processes of a group, each decomposing its share of the weights.

    Every weight draws from the key and its name, so the draw need not be sent. The process
    that decomposed a weight sends its residual and factors to the others. States that were the
    same bits everywhere are so afterwards, also on machines whose BLAS differ.

    Args:
        state: the state, the same in every process.
        key: as in `resample`, the same in every process.
        sampler: as in `resample`.
        group: None for all processes. Without torch.distributed initialised, or alone in the group,
            this is `resample`.
        donate: as in `resample`; it may differ between processes. After an exception half-way each
            has a state that is whole and computes the same; but one may have drawn where another
            has not.

    Returns:
        A new state, as of `resample`.

    Raises:
        ValueError: in every process, before anything is changed, if they differ in the key, in the
            sampler (by its name), or in the weights of the state (by a hash).
        RuntimeError: if another process failed (its error is quoted), was killed, or did not answer
            within the timeout of the group. That is 30 minutes by default, and the longest share
            has to be drawn within it: `init_process_group(timeout=timedelta(hours=2))`.
        Else as `resample`, in the process whose share it is.

    Example:
        >>> import rosa_func, torch
        >>> state = rosa_func.init(torch.nn.Sequential(torch.nn.Linear(6, 4)), 2)
        >>> new = rosa_func.distributed.resample(state, 1)
    """
    if _is_alone(group):
        return cycle.resample(state, key, sampler=sampler, donate=donate)
    with handing_over("resample") if donate else nullcontext(APART) as handover:
        return drawn_again(state, key, sampler, handover, group, is_checked=not donate)


def drawn_again(
    state: TensorDict,
    key: int,
    sampler: Sampler,
    handover: Handover,
    group: dist.ProcessGroup | None = None,
    *,
    is_checked: bool = True,
) -> TensorDict:
    """Do what `resample` does, with a `handover` of the old parts."""
    if _is_alone(group):
        return cycle.drawn_again(state, key, None, sampler, handover)
    rank, size = dist.get_rank(group), dist.get_world_size(group)

    def facts() -> dict[str, Any]:
        check_draw(key, sampler)
        if not is_checked:
            cycle.refuse_shared(state)
        called = getattr(sampler, "__qualname__", type(sampler).__name__)
        return {"the key": key, "the sampler": called, **_described(state)}

    refuse_different(facts, "resample", group)
    parts = read(state)
    adapted = parts.adapted()
    share: dict[str, Any] = {name: adapted[name] for name in list(adapted)[rank::size]}
    own: dict[str, Weight] = {}
    full: dict[str, Tensor] = {}

    def draw() -> dict[str, dict[Path, tuple[torch.dtype, torch.Size]]]:
        mine = write(Parts(share, parts.full))
        drawn = read(cycle.drawn_again(mine, key, None, sampler, handover))
        own.update(drawn.adapted())
        full.update(drawn.full)
        tensors = {name: entries(_of_one(name, w)) for name, w in own.items()}
        return {n: {p: (t.dtype, t.shape) for p, t in ts.items()} for n, ts in tensors.items()}

    new: dict[str, Weight] = {}
    # The entries of a weight are the same in every process; only its owner knows their shapes.
    for owner, each in enumerate(all_told(draw, "resample", group)):
        for name, shapes in each.items():
            mine = entries(_of_one(name, own[name])) if owner == rank else {}
            sent: Entries = {}
            for path, (dtype, shape) in shapes.items():
                if not is_drawn(path):
                    sent[path] = entries(_of_one(name, adapted[name]))[path].clone()
                    continue
                # Where its owner has it, too: backends of GPUs send nothing that is on the host.
                place = adapted[name].base.device
                sent[path] = (
                    mine[path].to(place).contiguous()
                    if owner == rank
                    else torch.empty(shape, dtype=dtype, device=place)
                )
                broadcast(sent[path], owner, "resample", group)
                kept = kept_as(adapted[name])
                if is_compensation(path) and kept is not None:
                    sent[path] = mine[path] if owner == rank else kept.keep(sent[path])
            found = read(from_entries(sent)).adapted()[name]
            new[name] = found if owner == rank else handover.weight(name, adapted[name], found)
    return write(parts.with_adapted(new)._replace(full=full))


def _described(state: TensorDict, *what: str) -> dict[str, str]:
    """Return what is the same in every process, by name: all that a draw reads.

    That is not all of a state: each process has its own statistics of BatchNorm.
    """
    parts = read(state)
    return {
        ".".join((*what, *path)): description(tensor)
        for path, tensor in entries(write(Parts({**parts.adapted()}, parts.full))).items()
    }


def _of_one(name: str, w: Weight) -> TensorDict:
    """Return the state of one weight."""
    return write(Parts({name: w}, {}))


def begin(
    model: nn.Module,
    state: TensorDict,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    density: Density | None = None,
    *,
    start: TensorDict | None = None,
    how: str = "mean_square",
    across: str = "weight",
    group: dist.ProcessGroup | None = None,
) -> TensorDict:
    """Do `sparse.begin` in all processes of a group: the first scores, and sends the support.

    A support is 4 bytes an entry of S. No gradient is sent, and the batches of the first process
    alone count: the others do not look at theirs, and wait.

    Args:
        model: as in `sparse.begin`.
        state: the state, the same in every process.
        batches: as in `sparse.begin`.
        loss: as in `sparse.begin`.
        density: as in `sparse.begin`.
        start: as in `sparse.begin`, the same in every process.
        how: as in `sparse.begin`.
        across: as in `sparse.begin`.
        group: as in `resample`.

    Returns:
        The state to go on with, the same in every process.

    Raises:
        ValueError: in every process, before the first has looked at a batch, if they differ in the
            weights of the state, or of `start`.
        RuntimeError: as `resample`. The others wait while the first scores.
        Else as `sparse.begin`, in the first process.

    Example:
        >>> import rosa_func, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> state, batches = rosa_func.init(model, 2), [torch.ones(3, 6)]
        >>> def loss(model, x):
        ...     return model(x).square().mean()
        >>> new = rosa_func.distributed.begin(model, state, batches, loss, 0.25)
    """

    def begun() -> TensorDict:
        options: dict[str, Any] = {"start": start, "how": how, "across": across}
        return sparse.begin(model, state, batches, loss, density, **options)

    if _is_alone(group):
        return begun()

    def facts() -> dict[str, str]:
        return _described(state) | ({} if start is None else _described(start, "start"))

    refuse_different(facts, "begin", group)
    is_first = dist.get_rank(group) == 0
    support: dict[str, Tensor] = {}

    def score() -> dict[str, tuple[torch.dtype, torch.Size]]:
        weights = read(begun()).adapted() if is_first else {}
        support.update({name: part.support for name, part in sparse_parts(weights).items()})
        return {name: (places.dtype, places.shape) for name, places in support.items()}

    adapted = read(state).adapted()
    for name, (dtype, shape) in all_told(score, "begin", group)[0].items():
        if not is_first:
            support[name] = torch.empty(shape, dtype=dtype, device=adapted[name].base.device)
        broadcast(support[name], 0, "begin", group)
    return sparse.move(state if start is None else start, support)


def check_equal(state: TensorDict, group: dist.ProcessGroup | None = None) -> str:
    """Make sure that all processes have the same state, bit for bit, and return its hash.

    Args:
        state: the state of this process.
        group: None for all processes.

    Returns:
        A SHA-256 of names, dtypes, shapes and bytes, in hexadecimal.

    Raises:
        RuntimeError: in every process, if the hashes differ (with all of them); or as `resample`.

    Example:
        >>> import rosa_func, torch
        >>> state = rosa_func.init(torch.nn.Sequential(torch.nn.Linear(6, 4)), 2)
        >>> len(rosa_func.distributed.check_equal(state))
        64
    """
    if _is_alone(group):
        return digest(state)
    hashes = all_told(lambda: digest(state), "compare states", group)
    if len(set(hashes)) > 1:
        raise RuntimeError(f"the processes have different states, by rank: {hashes}")
    return hashes[0]


def _is_alone(group: dist.ProcessGroup | None) -> bool:
    """Return whether there is no other process to share with."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1
