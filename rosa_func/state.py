"""The life of a state: init, resample, merge."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from rosa_func import exact as arithmetic
from rosa_func import keys, samplers
from rosa_func import targets as targeting
from rosa_func.draw import check_sampler, draw, draw_all
from rosa_func.layout import Split, check, parts
from rosa_func.parallel import map_weights
from rosa_func.samplers import Sampler, Site
from rosa_func.targets import Rank, Targets


def init(
    model: nn.Module,
    r: Rank,
    *,
    key: int = 0,
    sampler: Sampler = samplers.random,
    targets: Targets = None,
    train: str | Iterable[str] = (),
    exact: bool | None = None,
) -> TensorDict:
    """Split each target weight into a frozen residual and a trainable product of rank r.

        W = R + A B,    W: m x n,    A: m x r,    B: r x n

    The model is read, never written. The state shares the storage of every tensor that is not
    adapted (and of the adapted ones with `samplers.lora` and `samplers.additive`, where R = W);
    tensors in `train` are cloned. Weights of more than two dimensions count as m x (the rest), as
    in a convolution.

    Args:
        model: any `nn.Module` with its weights in float16, bfloat16, float32 or float64. The
            factors of a 16-bit weight are float32.
        r: the rank: an int, a fraction of min(m, n) in (0, 1) (rounded down, at least 1), or a
            mapping from patterns to either, of which the first match counts.
        key: any int. Each weight draws from `fold_in(key, "init", name)`, so that a draw does
            not depend on what else is adapted.
        sampler: how A and B are drawn from W, see `rosa_func.samplers`. The default is the
            paper's: on text no other was found to be better at more than one rank
            (examples/experiments/RESULTS.md, `samplers` and `e2e-samplers`).
        targets: None for every `nn.Linear` and `Conv1D` weight of the backbone; a string or
            strings, where "c_attn" or "attn.c_attn" means the weight of each module whose name
            ends so, and anything with `*` is an fnmatch pattern on names of modules or
            parameters; or a predicate `(name, owning module) -> bool`.
        train: names or patterns of parameters trained in full; "head" for a task head.
        exact: keep what rounding took from R, so that a merge returns W bit for bit (True), or
            not (False). None keeps it for 16-bit weights only, in their own dtype, which is
            enough to keep repeated merges from drifting.

    Returns:
        A TensorDict with the entries `frozen` {name: tensor}, `trainable` {name: {A, B} or
        tensor}, `input_dim` {name: 0 or 1}, and `compensation` {name: tensor} where kept. No
        leaf requires a gradient: see `parameters`.

    Raises:
        ValueError: for a rank out of range, a pattern without a match, a weight both adapted and
            in `train`, non-finite or meta weights, `max_norm` embeddings, nothing to adapt, or a
            decomposition that does not converge.
        TypeError: for a model, rank, key, sampler, pattern, `exact` or weight of the wrong type
            or dtype.

    Warns:
        UserWarning: if a task head would stay frozen at its random start.

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
    tensors = targeting.tensors(model)
    targeting.refuse_meta(model)
    return start(model, tensors.__getitem__, r, key, sampler, targets, train, exact)


def start(
    model: nn.Module,
    read: Callable[[str], Tensor],
    r: Rank,
    key: int,
    sampler: Sampler,
    targets: Targets,
    train: str | Iterable[str],
    exact: bool | None,
) -> TensorDict:
    """Do what `init` does, with the tensors of the model as `read` gives them by name."""
    keys.check_key(key)
    check_sampler(sampler)
    if exact is not None and not isinstance(exact, bool):
        raise TypeError(f"exact is True, False or None, got {exact!r}")
    plan = targeting.plan(model, targets, train)
    shapes = {name: tensor.shape for name, tensor in targeting.tensors(model).items()}
    targeting.check_rank_patterns(r, plan.adapted)
    ranks = {
        name: targeting.rank(r, name, _matrix_shape(name, shapes[name])) for name in plan.adapted
    }

    def work(name: str) -> Split | None:
        W = read(name)
        targeting.refuse_dtype(name, W)  # what a file holds need not be what its config says
        site = Site(name, plan.adapted[name], keys.generator(key, "init", name))
        kept = arithmetic.compensation_dtype(W.dtype, exact)
        return draw(W, ranks[name], sampler, site, W.dtype, kept)

    full = {name: read(name).clone() for name in plan.full}
    splits = draw_all(work, plan.adapted, full)
    # In the model's own order, the residuals in the place of the weights.
    frozen = {
        name: splits[name].R if name in splits else read(name)
        for name in shapes
        if name not in full
    }
    input_dim = {name: torch.tensor(dim) for name, dim in plan.adapted.items()}
    return _assemble(frozen, splits, full, input_dim)


def resample(
    state: TensorDict,
    key: int,
    *,
    r: Rank | None = None,
    sampler: Sampler = samplers.random,
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

    Returns:
        A new state, whose leaves require no gradient: take `parameters` of it anew.

    Raises:
        TypeError: if the key is not an int, or a rank has the wrong type.
        ValueError: for a rank out of range, non-finite weights, or no convergence (named).
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
    keys.check_key(key)
    check_sampler(sampler)
    adapted = check(state)
    if r is not None:
        targeting.check_rank_patterns(r, adapted)

    def work(name: str) -> Split | None:
        R, A, B, c = parts(state, name)
        rank = A.shape[1] if r is None else targeting.rank(r, name, (A.shape[0], B.shape[1]))
        site = Site(name, int(state["input_dim", name]), keys.generator(key, "resample", name))
        W = arithmetic.join(R, A, B, c).view(state["frozen", name].shape)
        return draw(W, rank, sampler, site, R.dtype, None if c is None else c.dtype, own=True)

    full = {
        name: value.detach().clone()
        for name, value in state["trainable"].items()
        if isinstance(value, Tensor)
    }
    splits = draw_all(work, adapted, full)
    frozen = dict(state["frozen"].items()) | {name: split.R for name, split in splits.items()}
    return _assemble(frozen, splits, full, dict(state["input_dim"].items()))


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
    adapted = check(state)

    def work(name: str) -> Tensor:
        R, A, B, c = parts(state, name)
        return arithmetic.join(R, A, B, c).to(R.dtype).view(state["frozen", name].shape)

    weights = {name: tensor.detach() for name, tensor in state["frozen"].items()}
    weights.update(zip(adapted, map_weights(work, adapted), strict=True))
    for name, value in state["trainable"].items():
        if isinstance(value, Tensor):
            weights[name] = value.detach()
    return weights


def _matrix_shape(name: str, shape: torch.Size) -> tuple[int, int]:
    if shape.numel() == 0:
        raise ValueError(f"{name} is empty, of shape {tuple(shape)}: nothing to factor")
    return shape[0], shape.numel() // shape[0]


def _assemble(
    frozen: dict[str, Tensor],
    splits: dict[str, Split],
    full: dict[str, Tensor],
    input_dim: dict[str, Tensor],
) -> TensorDict:
    """Put a state together."""
    trainable = {name: {"A": split.A, "B": split.B} for name, split in splits.items()}
    compensation = {name: split.c for name, split in splits.items() if split.c is not None}
    state: dict[str, dict[str, Any]] = {
        "frozen": frozen,
        "trainable": trainable | full,
        "input_dim": input_dim,
    }
    if compensation:
        state["compensation"] = compensation
    return TensorDict({part: TensorDict(entries) for part, entries in state.items()})
