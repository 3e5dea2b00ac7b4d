"""What several processes do to one state: shard it, draw for it together, compare it."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from hashlib import sha256
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor, nn

from rosa_func import cycle, keys, patterns, samplers, sparse
from rosa_func._exchange import described, drawn_again, is_alone
from rosa_func._supports import Density
from rosa_func._together import all_told, broadcast, refuse_different
from rosa_func.checkpoint import digest
from rosa_func.samplers import Sampler
from rosa_func.weight import Parts, Weight, read
from rosa_func.weight.donating import APART, handing_over
from rosa_func.weight.gathering import group_of, has_rows, is_matrix, is_sharded
from rosa_func.weight.layout import entries, from_entries, is_frozen, kept_apart, refuse_sharded
from rosa_func.weight.sharded import Sharded, shared, spread_over, whole
from rosa_func.weight.sparse_part import sparse_parts

if dist.is_available():
    from torch.distributed.device_mesh import DeviceMesh


def shard(
    state: TensorDict,
    mesh: "DeviceMesh",
    *,
    targets: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
) -> TensorDict:
    """Spread the frozen weights of a state over the ranks of a mesh, by rows.

        rank i of N holds the rows i ceil(m / N), ..., (i + 1) ceil(m / N) - 1 of R

    The rest of the state stays whole on each rank: what trains, and the optimizer's moments of
    it, are small. A product gathers its weight, in forward and again in backward, and the next one
    while this one computes, so a rank needs room for two whole weights beside its rows. The results
    are those of the whole state. Of quantised weights the codes are sharded and gathered. What
    storing a residual takes (compensation, master) is sharded with it.

    Every rank computes with the same weights in the same order, each with inputs of its own; the
    gradients of what trains are those of the rank, so average them, as DistributedDataParallel of
    a `RosaModule` does. `call`, `parameters`, optimizers, `optim.rebind`, gradient checkpointing
    and the transforms of torch.func work as ever, torch.compile does not. `resample`, `merge` and
    `checkpoint.delta` take one weight at a time; for all else, `gather` the state.

    A weight that is small beside what it computes with is better left whole: to gather it takes
    longer than the product (see examples/guide/sharding.md).

    Args:
        state: a state of `init` or `resample`, whole and the same on each rank (see `check_equal`).
        mesh: a mesh of torch.distributed. Rows are spread over its last dimension, and the same
            over all others (as in `fully_shard`).
        targets: patterns of the weights, as in `exclude` of `init`. None for all that are frozen
            and have two dimensions at least: adapted ones, embeddings, output layers.
        exclude: patterns of weights that stay whole.

    Returns:
        A new state of DTensors; tensors that stay whole are the given one's own. Let the given one
        go, and the model: `skeleton(model)` has no weights.

    Raises:
        TypeError: if the mesh is none, or a pattern is not a string.
        ValueError: if a pattern matches nothing; if there is nothing to shard, a weight is
            sharded already or on another device than the mesh, or what storing it took is kept
            apart from it.

    Source: Rajbhandari et al. 2020, "ZeRO", stage 3.

    Example:
        >>> import rosa_func, tempfile, torch
        >>> import torch.distributed as dist
        >>> file = tempfile.NamedTemporaryFile()
        >>> dist.init_process_group("gloo", f"file://{file.name}", rank=0, world_size=1)
        >>> mesh = dist.init_device_mesh("cpu", (1,))
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.ones(1, 6)
        >>> state = rosa_func.init(model, 2)
        >>> sharded = rosa_func.distributed.shard(state, mesh)
        >>> y = rosa_func.call(rosa_func.skeleton(model), sharded, x)
        >>> torch.allclose(y, rosa_func.call(model, state, x))
        True
        >>> dist.destroy_process_group()
    """
    if not dist.is_available() or not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"the mesh is a DeviceMesh, as of torch.distributed.init_device_mesh('cpu', (2,)), got "
            f"{type(mesh).__name__}"
        )
    chosen = _chosen(read(state), targets, exclude)
    found, apart, like = {}, kept_apart(state), spread_over(mesh)
    for path, tensor in entries(state).items():
        found[path] = tensor
        if not (is_frozen(path) and path[1] in chosen and has_rows(tensor.shape)):
            continue
        if path in apart:
            raise ValueError(
                f"what storing {path[1]} took is kept apart from it, on the host or in a folder, "
                "and each rank has its share beside its rows: keep_compensation(state, None)"
            )
        if tensor.device.type != mesh.device_type:
            raise ValueError(
                f"{path[1]} is on {tensor.device} and the mesh on {mesh.device_type}: move the "
                "state first, state.to(device)"
            )
        found[path] = shared(tensor.detach(), like)
    return from_entries(found)


def gather(state: TensorDict) -> TensorDict:
    """Return the whole of a sharded state, on every rank; `shard` reversed, bit for bit.

    Args:
        state: a state with weights that are sharded, or none. Every rank of the mesh calls this.

    Returns:
        A new state; the tensors that were whole are the given one's own.

    Raises:
        RuntimeError: if a rank does not take part.

    Example:
        See `shard`; `gather(shard(state, mesh))` is the state.
    """
    return from_entries({path: whole(path[1], t) for path, t in entries(state).items()})


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

    Sharded weights are drawn for in turns: each rank of their mesh collects one, decomposes it, and
    deals out its rows. No rank has more than its rows and one weight. The bits are those of
    `resample` of the whole state.

    Args:
        state: the state, the same in every process, or sharded by `shard`.
        key: as in `resample`, the same in every process.
        sampler: as in `resample`.
        group: None for all processes. Without torch.distributed initialised, or alone in the group,
            this is `resample`. Sharded weights are shared by the ranks of their mesh in any case.
        donate: as in `resample`; it may differ between processes. After an exception half-way each
            has a state that is whole and computes the same; but one may have drawn where another
            has not.

    Returns:
        A new state, as of `resample`.

    Raises:
        ValueError: in every process, before anything is changed, if they differ in the key, in the
            sampler (by its name), or in the weights of the state (by a hash). If a sharded state is
            to be donated.
        RuntimeError: if another process failed (its error is quoted), was killed, or did not answer
            within the timeout of the group. That is 30 minutes by default, and the longest share
            has to be drawn within it: `init_process_group(timeout=timedelta(hours=2))`.
        Else as `resample`, in the process whose share it is.

    Example:
        >>> import rosa_func, torch
        >>> state = rosa_func.init(torch.nn.Sequential(torch.nn.Linear(6, 4)), 2)
        >>> new = rosa_func.distributed.resample(state, 1)
    """
    if any(map(is_sharded, entries(state).values())):
        if donate:
            raise ValueError(
                "a sharded state cannot be donated: leave donate out (the new rows are a share of "
                "the weights, as the old ones are)"
            )
        return drawn_again(state, key, sampler, APART, group)
    if is_alone(group):
        return cycle.resample(state, key, sampler=sampler, donate=donate)
    with handing_over("resample") if donate else nullcontext(APART) as handover:
        return drawn_again(state, key, sampler, handover, group, is_checked=not donate)


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
            weights of the state, or of `start`. If the state is sharded: begin before.
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

    refuse_sharded(state, "begin")
    if is_alone(group):
        return begun()

    def facts() -> dict[str, str]:
        return described(state) | ({} if start is None else described(start, "start"))

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

    Of a sharded state, what is whole is the same in all processes, and rows where they are those of
    one weight; its hash is another one than that of the whole state.

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
    tensors = entries(state)

    def hashed() -> tuple[str, dict[str, tuple[int, str]]]:
        rows = {str(path): _rows_hash(t) for path, t in tensors.items() if is_sharded(t)}
        return digest({str(path): t for path, t in tensors.items() if not is_sharded(t)}), rows

    if not dist.is_available() or not dist.is_initialized():
        return hashed()[0]
    told = all_told(hashed, "compare states", group)
    own, hashes = told[0][0], [one for one, _ in told]
    if len(set(hashes)) > 1:
        raise RuntimeError(f"the processes have different states, by rank: {hashes}")
    found: dict[str, dict[int, str]] = {}
    for _, each in told:
        for path, (place, one) in each.items():
            if found.setdefault(path, {}).setdefault(place, one) != one:
                raise RuntimeError(f"the processes have different rows of {path}")
    return sha256(repr((own, sorted(found.items()))).encode()).hexdigest() if found else own


def _rows_hash(tensor: Any) -> tuple[int, str]:
    """Return which rows of a sharded tensor this rank has, and their hash."""
    return dist.get_rank(group_of(tensor)), digest({"": tensor.to_local()})


def _chosen(
    parts: Parts, targets: str | Iterable[str] | None, exclude: str | Iterable[str]
) -> set[str]:
    """Return the names of the weights to shard."""
    composable = parts.composable()
    frozen = {
        name: value
        for name, value in parts.frozen.items()
        if isinstance(value, Weight) or is_matrix(value)
    }
    named = {name: [name, keys.canonical(name)] for name in frozen}
    chosen = set(frozen) if targets is None else _meant(named, targets, "targets")
    chosen -= _meant(named, exclude, "exclude")
    if not chosen:
        raise ValueError("there is nothing to shard: no frozen weight of two dimensions is left")
    for name in sorted(chosen):
        if name in composable and isinstance(composable[name].base, Sharded):
            raise ValueError(f"{name} is sharded already: gather(state) makes it whole")
    return chosen


def _meant(named: dict[str, list[str]], given: str | Iterable[str], argument: str) -> set[str]:
    found: set[str] = set()
    for pattern in patterns.listed(given, argument):
        if not (meant := patterns.select(named, pattern)):
            raise ValueError(f"{pattern!r} {patterns.matches_nothing(pattern, named)}")
        found |= set(meant)
    return found
