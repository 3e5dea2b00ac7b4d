"""Save and load a state with whatever belongs to a run; the change alone; a digest."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from rosa_func import _shards, modules
from rosa_func.files import container, nested
from rosa_func.forward import check_fit
from rosa_func.keys import canonical
from rosa_func.weight import Weight, layout, read, rounding
from rosa_func.weight.factoring import Factored, factored
from rosa_func.weight.gathering import is_sharded
from rosa_func.weight.low_rank import LowRank, low_rank
from rosa_func.weight.parts import mapped
from rosa_func.weight.rounding import aligned
from rosa_func.weight.sharded import map_whole, whole
from rosa_func.weight.sparse_part import SparsePart, sparse_parts

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def save(path: str | os.PathLike[str], state: TensorDict, **extra: Any) -> None:
    """Write a state, or a `delta`, and anything that goes with it, to one safetensors file.

    The file is written beside its place, synced to the disk and renamed, so that a process
    killed at any moment leaves the old file or the new one (and perhaps a `.partial` file). A
    tensor that occurs twice is stored once. Needs the package safetensors; no pickle.

    A state that is sharded (`distributed.shard`) is written to a folder, by all processes: each
    writes its rows to a file of its own, the first also what is not sharded, and, when all have
    done so, an index with checksums. A process killed at any moment leaves the old index and its
    files, or the new one. Not through torch.distributed.checkpoint, whose index is a pickle.

    Args:
        path: the file, by custom with the suffix `.safetensors`; an old one is replaced. Of a
            sharded state a folder that all processes see, such as one a step: it is made where it
            is not there, and a checkpoint in it is replaced.
        state: a state of `init` or `resample`, or a `delta`.
        extra: what else a run needs: tensors, numpy arrays and scalars, numbers, strings, paths,
            `torch.Size` and None, nested in lists, tuples, dicts (of any such keys) and
            TensorDicts. So `optimizer.state_dict()`, a scheduler's, `torch.get_rng_state()` and
            `np.random.get_state()` can be passed as they are. A number or a string of a subclass
            comes back as a plain one: `torch.__version__`, or a member of an Enum of strings. Of a
            sharded state those of the first process are written.

    Raises:
        TypeError: if the state is not a TensorDict, or extra holds anything else, such as a
            quantised tensor or an array of objects (its path is named). Nothing is written then.
        FileNotFoundError: if the folder is not there.
        RuntimeError: of a sharded state, if another process failed (its error is quoted), was
            killed, or did not answer within the timeout of the group.

    Example:
        >>> import os, rosa_func, tempfile, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> state = rosa_func.init(model, 2)
        >>> optimizer = torch.optim.AdamW(rosa_func.parameters(state), weight_decay=0.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "run.safetensors")
        ...     rosa_func.checkpoint.save(path, state, optimizer=optimizer.state_dict(), step=7)
        ...     state, extra = rosa_func.checkpoint.load(path)
        >>> extra["step"]
        7
    """
    if not isinstance(state, TensorDictBase):
        raise TypeError(f"a state is a TensorDict, got {type(state).__name__}")
    if any(is_sharded(tensor) for tensor in layout.entries(state).values()):
        _shards.save(Path(path), state, extra)
    else:
        container.write(Path(path), {"state": state, **extra})


def load(
    path: str | os.PathLike[str], mesh: "DeviceMesh | None" = None
) -> tuple[TensorDict, dict[str, Any]]:
    """Read what `save` wrote, and check it.

    Args:
        path: the file; or the folder of a state that was sharded, on any number of processes.
        mesh: of such a folder, the processes over which the state is to be sharded, as in
            `distributed.shard`: each calls this, and reads its own rows, a piece of a weight at a
            time. None for the whole state, which needs no other process.

    Returns:
        The state, without `requires_grad`, and a dict of the extras as they were; on the CPU, but
        for shards, which are on the device of the mesh.

    Raises:
        FileNotFoundError: if there is no such file, or a folder lacks one.
        ValueError: if the file is truncated, altered, of a later version, or not one of `save`; or
            if a mesh is given for a state that was not sharded.
        RuntimeError: with a mesh, as `save`.

    Example:
        See `save`.
    """
    path = Path(path)
    if path.is_dir():
        return _shards.load(path, mesh)
    if mesh is not None and path.is_file():
        raise ValueError(f"{path} holds a whole state: load it, and use distributed.shard")
    content = container.read(path)
    return content.pop("state"), content


def digest(state: TensorDict | Mapping[str, Tensor]) -> str:
    """Return a hash of a state: the same for the same names, dtypes, shapes and bits.

    Args:
        state: a state, or any TensorDict or mapping of tensors, such as a state dict.

    Returns:
        A SHA-256 in hexadecimal, the same on every device and in every process.

    Example:
        >>> import rosa_func, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> one, other = (rosa_func.init(model, 2, key=key) for key in (0, 1))
        >>> rosa_func.checkpoint.digest(one) == rosa_func.checkpoint.digest(other)
        False
    """
    named: dict[Any, Tensor] = dict(
        layout.entries(state) if isinstance(state, TensorDictBase) else state
    )
    return nested.digest({}, {str(name): tensor for name, tensor in named.items()})


def delta(
    state: TensorDict, model: nn.Module, *, tol: float = 1e-7, rank: int | None = None
) -> TensorDict:
    """Return the change of each weight as a product of the smallest rank, and its sparse part.

        W - W0 = A B + S + E,    |E| <= tol |W|  (Frobenius),    W0 of the model

    W is what `merge` returns, before it is rounded to 16 bits; the rounding of A and B to float32
    comes on top of tol, and is in the `error` that is returned. In a batch each matrix has its
    own error, and all have one rank.

    A change after K cycles of rank r has rank 2 r K at most: a few MB to keep or send where the
    merged model has hundreds. A float32 residual is rounded at every resample, in all directions:
    after about 100 cycles that alone is 1e-7 of |W|, and takes a high rank. Then raise tol, give
    `rank`, or train with `exact=True`, where nothing is lost. S is the sparse part of now: what a
    resample has merged of earlier values is in A B, and takes a high rank as well.

    Args:
        state: a state of `init` or `resample`, trained or not.
        model: the model as `init` was given it.
        tol: the largest error of a weight, relative to the weight.
        rank: a rank for all, in place of tol; never more than min(m, n).

    Returns:
        A TensorDict with the entries `change` {name: {A: m x k, B: k x n}}, `sparse`
        {name: {values, support}} where there are such parts, see `rosa_func.sparse`, `full`
        {name: tensor} of those trained in full that changed, in the model's dtypes, and `error`
        {name: |E| / |W|, float64}.
        `checkpoint.save` takes it as it takes a state.

    Raises:
        KeyError: if the model and the state have different names (named).
        ValueError: if shapes differ, tol is negative, a rank is not positive, or the model is a
            skeleton.

    Source: Eckart and Young 1936.

    Example:
        >>> import rosa_func, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(60, 40))
        >>> state = rosa_func.init(model, 2)
        >>> state["trainable", "0.weight", "A"] += 1e-2
        >>> change = rosa_func.checkpoint.delta(state, model)
        >>> change["change", "0.weight", "A"].shape
        torch.Size([40, 1])
    """
    if not tol >= 0:
        raise ValueError(f"tol is a relative error of at least 0, got {tol!r}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank is None or a positive int, got {rank!r}")
    modules.refuse_meta(model)
    names = check_fit(model, state)
    pretrained = {names[name]: tensor for name, tensor in modules.tensors(model).items()}
    parts = read(state)
    adapted = parts.adapted()

    sparse = {name: aligned(part) for name, part in sparse_parts(adapted).items()}

    def changed(name: str, w: Weight) -> Factored:
        W0 = pretrained[name]
        shape = low_rank(w).shape
        W = rounding.computed(w).double().reshape(shape)
        D = W - W0.reshape(shape).to(W)
        if name in sparse:
            D -= sparse[name].product(D.shape)
        dtype = rounding.factor_dtype(W0.dtype)
        return factored(D, W.norm(dim=(-2, -1)), tol=tol, rank=rank, dtype=dtype)

    changes = map_whole(changed, adapted)
    rest = {name: t for name, t in parts.frozen.items() if isinstance(t, Tensor)}
    rest |= parts.rounded()
    entries: dict[str, dict[str, Any]] = {
        "change": {name: {"A": change.A, "B": change.B} for name, change in changes.items()},
        "full": {
            name: now.detach().clone()
            for name, tensor in pretrained.items()
            if name not in changes and not torch.equal(now := whole(name, rest[name]), tensor)
        },
        "error": {name: change.error for name, change in changes.items()},
    }
    if sparse:
        entries["sparse"] = {name: part._asdict() for name, part in sparse.items()}
    return TensorDict({part: TensorDict(value) for part, value in entries.items()})


def apply_delta(model: nn.Module, delta: TensorDict) -> dict[str, Tensor]:
    """Return the dense weights of the changed model, as `merge` returned them up to the error.

        W = W0 + A B + S

    Args:
        model: the model that the delta was made with; it is not written to.
        delta: of `delta`.

    Returns:
        {name: tensor} in the model's dtypes, for `load_state_dict` (`strict=False` where weights
        are tied). Tensors that did not change share their storage with the model.

    Raises:
        KeyError: if the delta lacks a part, or has a name that is not in the model.
        ValueError: if a shape differs (both are named).

    Example:
        >>> import rosa_func, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(60, 40))
        >>> state = rosa_func.init(model, 2)
        >>> state["trainable", "0.weight", "A"] += 1e-2
        >>> change = rosa_func.checkpoint.delta(state, model)
        >>> weights = rosa_func.checkpoint.apply_delta(model, change)
        >>> torch.allclose(weights["0.weight"], rosa_func.merge(state)["0.weight"], atol=1e-7)
        True
    """
    if missing := {"change", "full"} - set(delta.keys()):
        raise KeyError(f"the delta has no entry {min(missing)!r}; it has {sorted(delta.keys())}")
    modules.refuse_meta(model)
    weights = modules.tensors(model)
    own: dict[str, str | None] = {}
    for name in weights:  # None: it could be either
        own[canonical(name)] = None if canonical(name) in own else name

    def named(name: str) -> str:
        found = name if name in weights else own.get(canonical(name))
        if found is None:
            raise KeyError(
                f"the delta changes {name}, and {type(model).__name__} has no tensor of that name; "
                "was it made with this model?"
            )
        return found

    changed, sparse = {}, delta.get("sparse", {})
    for given, value in delta["change"].items():
        name, factors = named(given), LowRank(value["A"], value["B"])
        terms: list[Any] = [factors]
        if given in sparse:
            terms.append(SparsePart(sparse[given]["values"], sparse[given]["support"]))
        W = weights[name]
        if any(term.check(W.shape) for term in terms):
            raise _of_another_shape(given, factors.shape, model, W)
        new = W.to(factors.A.dtype)
        for term in terms:
            new = mapped(term, partial(Tensor.to, device=W.device), term._fields).fold(new)
        changed[name] = new.to(W.dtype)
    for given, tensor in delta["full"].items():
        name = named(given)
        if tensor.shape != weights[name].shape:
            raise _of_another_shape(given, tuple(tensor.shape), model, weights[name])
        changed[name] = tensor.to(weights[name])
    return weights | changed


def _of_another_shape(name: str, shape: tuple[int, ...], model: nn.Module, W: Tensor) -> ValueError:
    return ValueError(
        f"the delta changes {name} of shape {shape}, and {type(model).__name__} has it of shape "
        f"{tuple(W.shape)}"
    )
