"""The life of a state: init, resample, merge."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, NoReturn

from tensordict import TensorDict
from torch import Tensor, nn

from rosa_func import keys, modules, patterns, peft_names, samplers, targeting
from rosa_func.drawing import Draw, draw, draw_all
from rosa_func.patterns import Rank
from rosa_func.samplers import Sampler
from rosa_func.targeting import Plan, Targets
from rosa_func.weight import Parts, Weight, read, rounding, write
from rosa_func.weight.dense import Dense
from rosa_func.weight.low_rank import low_rank
from rosa_func.weight.parallel import map_weights


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
    **others: NoReturn,
) -> TensorDict:
    """Split each target weight into a frozen residual and a trainable product of rank r.

        W = R + A B,    W: m x n,    A: m x r,    B: r x n

    The model is read, never written. The state shares the storage of every tensor that is not
    adapted (and of the adapted ones with `samplers.lora` and `samplers.additive`, where R = W);
    tensors in `train` are cloned, in float32 where the model has 16 bits: they are cast to the
    model's dtype in each forward pass, and rounded once in `merge`.

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
            not (False). None keeps it for 16-bit weights only, in their own dtype, which is
            enough to keep repeated merges from drifting.
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
            gradients in `train`, nothing to train, or a decomposition that does not converge.
        TypeError: for a model, rank, key, sampler, pattern, `exact` or weight of the wrong type
            or dtype, a model with adapters of peft or 8-bit layers of bitsandbytes in it, or a
            quantised or sharded tensor in `targets` or `train` (elsewhere it stays as it is).

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
    tensors = modules.tensors(model)
    modules.refuse_meta(model)
    modules.refuse_int8(model)
    check_options(key, sampler, exact)
    plan = targeting.plan(model, r, targets, train, exclude)
    modules.refuse_sparse_gradients(model, plan.full)
    return split_all(plan, tensors.__getitem__, key=key, sampler=sampler, exact=exact)


def check_options(key: int, sampler: Sampler, exact: bool | None = None) -> None:
    """Refuse options of the wrong type."""
    keys.check_key(key)
    samplers.check_sampler(sampler)
    if exact is not None and not isinstance(exact, bool):
        raise TypeError(f"exact is True, False or None, got {exact!r}")


def split_all(
    plan: Plan, load: Callable[[str], Tensor], *, key: int, sampler: Sampler, exact: bool | None
) -> TensorDict:
    """Do what `init` does by a plan, with the tensors of the model as `load` gives them by name."""

    def drawn(name: str) -> Weight:
        W, (r, input_dim) = load(name), plan.adapted[name]
        targeting.refuse_dtype(name, W)  # what a file holds need not be what its config says
        modules.refuse_wrapper(name, W)
        kept = rounding.compensation_dtype(W.dtype, exact)
        generator = partial(keys.generator, key, "init", name)
        how = Draw(name, r, sampler, input_dim, generator, kept)
        return draw(how, W, Dense(W))

    full, dtypes = {}, {}
    for name in plan.full:
        tensor = load(name)
        modules.refuse_wrapper(name, tensor)
        full[name] = tensor.to(rounding.factor_dtype(tensor.dtype), copy=True)
        if full[name].dtype != tensor.dtype:
            dtypes[name] = tensor.dtype
    weights = draw_all(drawn, plan.adapted, full)
    frozen = {
        name: weights[name] if name in weights else load(name)
        for name in plan.names
        if name not in full
    }
    return write(Parts(frozen, full, dtypes))


def resample(
    state: TensorDict,
    key: int,
    *,
    r: Rank | None = None,
    sampler: Sampler = samplers.random,
    **others: NoReturn,
) -> TensorDict:
    """Merge each adapted weight and draw a new subspace for it; the function stays the same.

        W = R + A B,    then    W = R' + A' B'    with A', B' drawn from W

    How often depends on the task: a few cycles a run were better than one on E2E and source code
    and worse on ELI5 (examples/experiments/RESULTS.md, `e2e-every`, `code`, `eli5-variants`).
    Begin with none, and add resamples where a dev set gains.

    Nothing is differentiated through the decomposition. Where a compensation is kept, the sum
    that is split again is the unrounded one, so 16-bit weights neither drift nor lose small
    updates. Frozen tensors that are not adapted are shared with the given state, which stays as it
    was; those trained in full are cloned.

    Args:
        state: a state of `init` or `resample`, trained or not.
        key: any int; each weight draws from `fold_in(key, "resample", name)`. Pass another one
            each time, such as the step.
        r: None for the ranks as they are, or a new one as in `init`.
        sampler: as in `init`; it need not be the one that drew the state.
        others: none, as in `init`.

    Returns:
        A new state, whose leaves require no gradient: call `parameters` on it again.

    Raises:
        TypeError: if the key is not an int, or a rank has the wrong type.
        ValueError: for a rank out of range, non-finite weights, no convergence (named), or states
            that are stacked: resample each of them.
        KeyError: if an entry of the state is missing (named).

    Source: Hameed and Rabusseau 2023, "ROSA", algorithm 1.

    Example:
        >>> import rosa_func, torch
        >>> state = rosa_func.init(torch.nn.Sequential(torch.nn.Linear(6, 4)), 2)
        >>> new = rosa_func.resample(state, 1)
        >>> old_weight, new_weight = (rosa_func.merge(s)["0.weight"] for s in (state, new))
        >>> torch.allclose(old_weight, new_weight, atol=1e-6)
        True
    """
    peft_names.refuse(others)
    check_options(key, sampler)
    parts = read(state)
    adapted = parts.adapted()
    named = {name: [name, keys.canonical(name)] for name in adapted}
    ranks = {} if r is None else patterns.ranks(r, named)

    def redrawn(name: str) -> Weight:
        w = adapted[name]
        if w.input_dim.ndim:
            raise ValueError(
                f"{name} is a stack of {len(w.input_dim)} states' weights: resample each state, "
                "and stack the new ones"
            )
        factors = low_rank(w)
        how = Draw(
            name,
            patterns.rank(ranks[name], name, factors.matrix_shape) if ranks else factors.r,
            sampler,
            int(w.input_dim),
            partial(keys.generator, key, "resample", name),
            None if w.lost is None else w.lost.dtype,
        )
        new = draw(how, rounding.join(w), w.base, w.terms, own=True)
        return new._replace(input_dim=w.input_dim.clone())  # on the device of the old one

    full = {name: value.detach().clone() for name, value in parts.full.items()}
    weights = draw_all(redrawn, adapted, full)
    return write(parts._replace(frozen={**parts.frozen, **weights}, full=full))


def merge(state: TensorDict) -> dict[str, Tensor]:
    """Return the dense weights, ready for `load_state_dict`.

        W = R + A B,    with a kept compensation c: W = R + c + A B, rounded once

    Tied weights come once, under their first name: pass `strict=False` to `load_state_dict` then.
    Tensors that are not adapted share their storage with the state.

    Args:
        state: a state of `init` or `resample`, trained or not.

    Returns:
        {name: tensor} in the model's own dtypes, without gradient.

    Raises:
        KeyError: if an entry of the state is missing (named).

    Example:
        >>> import rosa_func, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> weights = rosa_func.merge(rosa_func.init(model, 2, exact=True))
        >>> torch.equal(weights["0.weight"], model[0].weight)
        True
    """
    parts = read(state)
    adapted = parts.adapted()

    def merged(name: str) -> Tensor:
        w = adapted[name]
        return rounding.join(w).to(w.base.dtype)

    dense = dict(zip(adapted, map_weights(merged, adapted), strict=True))
    rest = {name: t.detach() for name, t in parts.frozen.items() if isinstance(t, Tensor)}
    full = {name: value.detach() for name, value in parts.rounded().items()}
    return {name: dense[name] if name in dense else rest[name] for name in parts.frozen} | full


class Method(NamedTuple):
    """`init` and `resample` with their options bound, see `method`."""

    init: Callable[..., TensorDict]
    resample: Callable[..., TensorDict]


def method(
    r: Rank | None,
    *,
    sampler: Sampler = samplers.random,
    targets: Targets = None,
    train: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    exact: bool | None = None,
    **others: NoReturn,
) -> Method:
    """Bind the options of `init` and `resample` once, as optax binds init and update.

        method(r, **options).init(model, key=0)      = init(model, r, key=0, **options)
        method(r, **options).resample(state, key)    = resample(state, key, r=r, sampler=sampler)

    Args:
        r: the rank, as in `init`. None, where nothing is adapted.
        sampler: for the first draw and for those after it.
        targets: as in `init`.
        train: as in `init`.
        exclude: as in `init`.
        exact: as in `init`.
        others: none, as in `init`.

    Returns:
        A named pair of functions.

    Example:
        >>> import rosa_func, torch
        >>> pissa = rosa_func.method(2, sampler=rosa_func.samplers.top)
        >>> state = pissa.init(torch.nn.Sequential(torch.nn.Linear(6, 4)))
        >>> state = pissa.resample(state, 1)
    """
    peft_names.refuse(others)
    return Method(
        init=partial(
            init,
            r=r,
            sampler=sampler,
            targets=targets,
            train=train,
            exclude=exclude,
            exact=exact,
        ),
        resample=partial(resample, r=r, sampler=sampler),
    )
