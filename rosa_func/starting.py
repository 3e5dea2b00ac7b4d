"""The beginning of a state: init."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NoReturn

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from rosa_func import keys, modules, peft_names, samplers, targeting
from rosa_func._exchange import made_in_turns
from rosa_func.drawing import Draw, Progress, check_draw, draw, draw_all, refuse_non_finite
from rosa_func.patterns import Rank
from rosa_func.samplers import Sampler
from rosa_func.storage import Master, Storage
from rosa_func.targeting import Plan, Targets
from rosa_func.weight import Parts, Weight, write
from rosa_func.weight.donating import Take, emptying
from rosa_func.weight.gathering import has_rows, is_matrix
from rosa_func.weight.keeping import Place
from rosa_func.weight.rounding import factor_dtype
from rosa_func.weight.sharded import shared
from rosa_func.weight.sharing import shared_model
from rosa_func.weight.spent import refuse_spent


def init(
    model: nn.Module,
    r: Rank | None = None,
    *,
    key: int = 0,
    sampler: Sampler = samplers.random,
    targets: Targets = None,
    train: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    exact: bool | None = None,
    compensation: Place = None,
    donate: bool = False,
    progress: Progress = False,
    quantize: str | None = None,
    master: Master = None,
    **others: NoReturn,
) -> TensorDict:
    """Split each target weight into a frozen residual and a trainable product of rank r.

        W = R + A B,    W: m x n,    A: m x r,    B: r x n

    The model is read, never written, unless it is donated. The state shares the storage of every
    tensor that is not adapted (and of the adapted ones with `samplers.lora` and
    `samplers.additive`, where R = W); tensors in `train` are cloned, in float32 where the model has
    16 bits: they are cast to the model's dtype in each forward pass, and rounded once in `merge`.

    A convolution's weight counts as m x (the rest). Any other weight of three or more dimensions is
    a batch of matrices, such as the experts of a layer: each has factors of its own,

        W[e] = R[e] + A[e] B[e],    A: experts x m x r,    B: experts x r x n

    Args:
        model: any `nn.Module` with its weights in float16, bfloat16, float32 or float64. The
            factors of a 16-bit weight are float32, and so is what trains in full.
        r: the rank: an int, a fraction of min(m, n) in (0, 1) (rounded down, at least 1), or a
            mapping from patterns to either, of which the first match counts. 0 is for a sparse
            part alone (`rosa_func.sparse`). It may be left out where nothing is adapted.
        key: any int. Each weight draws from `fold_in(key, "init", name)`, so that a draw does
            not depend on what else is adapted; a matrix of a batch, from that and its place.
        sampler: how A and B are drawn from W, see `rosa_func.samplers`. The default is the
            paper's: on text, no other one was better at more than one rank
            (examples/experiments/RESULTS.md, `samplers` and `e2e-samplers`).
        targets: None or "all-linear" for every `nn.Linear` and `Conv1D` weight and all experts of
            the backbone, without what is in `train`; a name or pattern, or several; or a predicate
            `(name, owning module) -> bool`. A name is that of parameters, or of modules with all
            matrices in them, wherever they are: "c_attn", "h.0.attn", "experts.down_proj". A
            pattern has the `*`, `?` or `[...]` of fnmatch in it. The full name of a parameter
            means that one alone. An empty list, with `train`, adapts nothing:
            `init(model, targets=(), train="*")` is full fine-tuning.
        train: names or patterns, as in `targets`, of parameters trained in full; "head" for a task
            head.
        exclude: names or patterns of what is not adapted, though `targets` means it.
        exact: keep what rounding took from R, so that a merge returns W bit for bit (True), or
            not (False). None keeps it for 16-bit weights only, and of it the next eight bits,
            which is enough to keep repeated merges from drifting.
        compensation: where that is kept: None for beside the weight, "cpu" for the host, or a
            folder, in which it is memory-mapped (in files without a name, which are gone with the
            state). `resample` and `merge` read it, one weight at a time, and keep it there; a
            forward pass does not. Where a state is loaded or moved as a whole, it is beside the
            weights again: see `keep_compensation`.
        donate: whether the state may take the memory of the model, weight by weight, so that there
            is no second copy of it. The model is empty then: `call` and `skeleton` take it as
            before, and any other use of its weights is an error. After an exception half-way
            (Ctrl-C) what was taken is merged back into the model, rounded as by `merge`.
        progress: True for a bar (tqdm), or a function that is called with (done, total, name) after
            each adapted weight.
        quantize: how the residuals of the adapted weights are stored: None for as they are, "nf4"
            (4 bits a value), "nf4_double" (its scales in 8 bits) or "int8"; in blocks of 64 with a
            scale each, see `rosa_func.quantised`. A weight with rank 0 is quantised as it is.
        master: where what quantising takes from R is kept, in 16 bits, or with exact=True so that
            a merge into the master returns W bit for bit: None for nowhere, True for beside the
            weight, "cpu" for the host, or a folder, in which it is memory-mapped. A `resample`
            reads it, a forward pass does not.
        others: none; an argument of peft is answered with what says the same here.

    Returns:
        A TensorDict with the entries `frozen` {name: tensor}, `trainable` {name: {A, B} or
        tensor}, `input_dim` {name: 0 or 1, or -2 or -1 for a batch}, `compensation`
        {name: tensor} where kept (without elements while nothing was lost), and `model_dtype`
        {name: zero} of what trains in full in another dtype than the model's, of that dtype.
        No leaf requires a gradient: see `parameters`.

    Raises:
        ValueError: for a rank out of range, a pattern without a match, a weight both adapted and
            in `train`, non-finite or meta weights, `max_norm` embeddings, 16-bit ones with sparse
            gradients in `train`, nothing to train, a decomposition that does not converge, options
            that do not go together; or if a model is donated that shares the memory of a weight in
            `targets` or `train` with another model, a state or a graph that waits for its backward
            pass (named).
        TypeError: for a model, rank, key, sampler, pattern, option or weight of the wrong type or
            dtype, a model with adapters of peft or 8-bit layers of bitsandbytes in it, or a
            quantised or sharded tensor in `targets` or `train` (elsewhere it stays as it is).
        OSError: if the folder for the compensation, or the master, is gone, full, or not to be
            written to.

    Warns:
        UserWarning: if a task head would stay frozen at its random start, or the default targets
            leave out matrices of the backbone that are not those of a linear layer.

    Source: Hameed and Rabusseau 2023, "ROSA", equations 2-4.

    Example:
        >>> import rosa_func, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> state = rosa_func.init(model, 2)
        >>> state["trainable", "0.weight", "A"].shape
        torch.Size([4, 2])
        >>> torch.allclose(rosa_func.merge(state)["0.weight"], model[0].weight, atol=1e-6)
        True
    """
    peft_names.refuse(others)
    own = modules.own_tensors(model)
    refuse_spent(own.values())
    modules.refuse_meta(model)
    modules.refuse_int8(model)
    check_draw(key, sampler, progress)
    storage = Storage(exact, compensation, quantize, master).check()
    plan = targeting.plan(model, r, targets, train, exclude)
    modules.refuse_sparse_gradients(model, plan.full)
    if donate:
        _refuse_shared(model, [(name, own[name]) for name in [*plan.adapted, *plan.full]])
    with emptying(own) if donate else nullcontext((modules.tensors(model), None)) as given:
        tensors, take = given
        return split_all(
            plan,
            tensors.__getitem__,
            lambda name: tensors[name].device,
            key=key,
            sampler=sampler,
            storage=storage,
            take=take,
            progress=progress,
        )


def _refuse_shared(model: nn.Module, taken: list[tuple[str, Tensor]]) -> None:
    """Refuse to take the memory of tensors that something else than the model needs."""
    if (sharer := shared_model(model, taken)) is not None:
        raise ValueError(
            f"{sharer}: the model cannot be donated; let the other go, or leave donate out"
        )


def split_all(
    plan: Plan,
    load: Callable[[str], Tensor],
    device_of: Callable[[str], torch.device],
    *,
    key: int,
    sampler: Sampler,
    storage: Storage,
    take: Take | None = None,
    progress: Progress = False,
    like: Any = None,
) -> TensorDict:
    """Do what `init` does by a plan, with the tensors of the model as `load` gives them by name.

    `device_of` says where an adapted one will be. `take` puts a new weight into the memory of the
    old one, and there is no other that needs it. Where there is a DTensor that the frozen weights
    are to be `like`, they are sharded at once.
    """
    if take is not None:  # before anything is written
        refuse_non_finite([], {name: load(name) for name in [*plan.adapted, *plan.full]})

    def drawn(name: str) -> Weight:
        W, (r, input_dim) = load(name), plan.adapted[name]
        targeting.refuse_dtype(name, W)  # what a file holds need not be what its config says
        modules.refuse_wrapper(name, W)
        generator = partial(keys.generator, key, "init", name)
        how = Draw(name, r, sampler, input_dim, generator, storage.kept(W))
        new = draw(how, W, storage.like(W, batch=input_dim < 0))
        return new if take is None else take(W, new)

    full, dtypes = in_full(plan, load, copy=take is None)
    if like is None:
        devices = {name: device_of(name) for name in plan.adapted}
        return assembled(plan, load, draw_all(drawn, devices, full, progress), full, dtypes)
    refuse_non_finite([], full)
    split = made_in_turns(drawn, plan.adapted, like)
    return assembled(plan, lambda name: _own_rows(load(name), like), split, full, dtypes)


def _own_rows(tensor: Tensor, like: Any) -> Tensor:
    """Return the rows of this process of what `distributed.shard` shards, and the rest whole."""
    is_spread = is_matrix(tensor) and has_rows(tensor.shape)
    found: Tensor = shared(tensor, like) if is_spread else tensor
    return found


def in_full(
    plan: Plan, load: Callable[[str], Tensor], *, copy: bool
) -> tuple[dict[str, Tensor], dict[str, torch.dtype]]:
    """Return what trains in full, as it trains, and the model's dtypes of what is in another."""
    full, dtypes = {}, {}
    for name in plan.full:
        tensor = load(name)
        modules.refuse_wrapper(name, tensor)
        full[name] = tensor.to(factor_dtype(tensor.dtype), copy=copy)
        if full[name].dtype != tensor.dtype:
            dtypes[name] = tensor.dtype
    return full, dtypes


def assembled(
    plan: Plan,
    load: Callable[[str], Tensor],
    weights: Mapping[str, Weight],
    full: dict[str, Tensor],
    dtypes: dict[str, torch.dtype],
) -> TensorDict:
    """Return the state: these weights, what trains in full, and the rest as `load` gives it."""
    frozen = {
        name: weights[name] if name in weights else load(name)
        for name in plan.names
        if name not in full
    }
    return write(Parts(frozen, full, dtypes))
