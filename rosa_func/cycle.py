"""The life of a state after `init`: resample, merge."""

from contextlib import nullcontext
from functools import partial
from typing import NoReturn

from tensordict import TensorDict
from torch import Tensor

from rosa_func import keys, patterns, peft_names, samplers
from rosa_func.drawing import Draw, Progress, check_draw, draw, draw_all, draw_beside
from rosa_func.patterns import Rank
from rosa_func.samplers import Sampler
from rosa_func.weight import Weight, read, rounding, write
from rosa_func.weight.donating import APART, Handover, handing_over
from rosa_func.weight.keeping import kept_as
from rosa_func.weight.low_rank import low_rank
from rosa_func.weight.sharded import Sharded, map_whole, shared
from rosa_func.weight.sharing import shared_state


def resample(
    state: TensorDict,
    key: int,
    *,
    r: Rank | None = None,
    sampler: Sampler = samplers.random,
    donate: bool = False,
    progress: Progress = False,
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

    A quantised residual is quantised again, by its master. Without one only samplers go on whose
    product is zero at first (`samplers.additive`, `samplers.lora`): its codes stay as they are, as
    do sparse parts, and the factors so far go on frozen beside the new ones,

        W = R + A_1 B_1 + ... + A_k B_k    (so the rank of the frozen part grows by r a draw)

    Args:
        state: a state of `init` or `resample`, trained or not.
        key: any int; each weight draws from `fold_in(key, "resample", name)`. Pass another one
            each time, such as the step.
        r: None for the ranks as they are, or a new one as in `init`.
        sampler: as in `init`; it need not be the one that drew the state.
        donate: whether the new state may take the memory of the given one, weight by weight, so
            that there is no second copy of the residuals. The bits are the same. The given state
            is spent then: it may be passed to `optim.rebind`, and any other use is an error. No
            other thread may use it meanwhile. After an exception half-way (Ctrl-C) it is whole, and
            computes the same: each weight is the old or the new one, in the same tensors, and the
            gradients of new factors are dropped. An optimizer of it should start again then.
        progress: as in `init`.
        others: none, as in `init`.

    Returns:
        A new state, whose leaves require no gradient: call `parameters` on it again.

    Raises:
        TypeError: if the key is not an int, or a rank has the wrong type.
        ValueError: for a rank out of range, non-finite weights, no convergence (named); for states
            that are stacked: resample each of them; for a residual that is quantised without a
            master, with a sampler whose product is not zero; or if a state is donated that shares
            the memory of a residual, or of what trains in full, with a model, another state or a
            graph that waits for its backward pass (named). Nothing is changed then.
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
    check_draw(key, sampler, progress)
    if donate:
        refuse_shared(state)
    with handing_over("resample") if donate else nullcontext(APART) as handover:
        return drawn_again(state, key, r, sampler, handover, progress)


def refuse_shared(state: TensorDict) -> None:
    """Refuse to donate a state whose memory something else needs."""
    if (sharer := shared_state(state)) is not None:
        raise ValueError(
            f"{sharer}: the state cannot be donated; let the other go (rosa_func.skeleton(model) "
            "is a model without weights), or leave donate out"
        )


def drawn_again(
    state: TensorDict,
    key: int,
    r: Rank | None,
    sampler: Sampler,
    handover: Handover,
    progress: Progress = False,
) -> TensorDict:
    """Do what `resample` does, with a `handover` of the old parts."""
    parts = read(state)
    adapted = parts.adapted()
    if sharded := [name for name, w in adapted.items() if isinstance(w.base, Sharded)]:
        raise ValueError(
            f"{sharded[0]} is sharded: rosa_func.distributed.resample(state, key), in all "
            "processes, draws for such a state, without a change of its ranks"
        )
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
            kept_as(w),
        )
        if w.is_closed():
            new = draw_beside(how, rounding.join(w), w)
        else:
            new = draw(how, rounding.join(w), w.base, w.terms, own=True)
        new = new._replace(input_dim=w.input_dim.clone())  # on the device of the old one
        return handover.weight(name, w, new)

    weights = draw_all(redrawn, adapted, parts.full, progress)
    full = {name: handover.leaf(name, value) for name, value in parts.full.items()}
    return write(parts.with_adapted(weights)._replace(full=full))


def merge(state: TensorDict) -> dict[str, Tensor]:
    """Return the dense weights, ready for `load_state_dict`.

        W = R + A B,    with a kept compensation c: W = R + c + A B, rounded once

    These are the weights that `call` computes with. So a quantised residual goes in as it is,
    without its master; see `rosa_func.quantised` for both.

    Of a sharded state the weights are sharded as their residuals are: `gather` them, or each by its
    `full_tensor()`, in all processes. Every process merges all of them, one at a time.

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

    def merged(name: str, w: Weight) -> Tensor:
        W, base = rounding.computed(w).to(w.base.dtype), adapted[name].base
        return shared(W, base.like) if isinstance(base, Sharded) else W

    dense = map_whole(merged, adapted)
    rest = {name: t.detach() for name, t in parts.frozen.items() if isinstance(t, Tensor)}
    full = {name: value.detach() for name, value in parts.rounded().items()}
    return {name: dense[name] if name in dense else rest[name] for name in parts.frozen} | full
