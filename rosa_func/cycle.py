"""The life of a state after `init`: resample, merge."""

from functools import partial
from typing import NoReturn

from tensordict import TensorDict
from torch import Tensor

from rosa_func import keys, patterns, peft_names, samplers
from rosa_func.drawing import Draw, check_draw, draw, draw_all, draw_beside
from rosa_func.patterns import Rank
from rosa_func.samplers import Sampler
from rosa_func.weight import Weight, read, rounding, write
from rosa_func.weight.keeping import kept_as
from rosa_func.weight.low_rank import low_rank
from rosa_func.weight.parallel import map_weights


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
        others: none, as in `init`.

    Returns:
        A new state, whose leaves require no gradient: call `parameters` on it again.

    Raises:
        TypeError: if the key is not an int, or a rank has the wrong type.
        ValueError: for a rank out of range, non-finite weights, no convergence (named), states
            that are stacked: resample each of them; or a residual that is quantised without a
            master, with a sampler whose product is not zero.
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
    check_draw(key, sampler)
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
            kept_as(w.lost),
        )
        W = rounding.join(w)
        if w.base.coarse and w.lost is None:
            new = draw_beside(how, W, w)
        else:
            new = draw(how, W, w.base, w.terms, own=True)
        return new._replace(input_dim=w.input_dim.clone())  # on the device of the old one

    full = {name: value.detach().clone() for name, value in parts.full.items()}
    weights = draw_all(redrawn, adapted, full)
    return write(parts._replace(frozen={**parts.frozen, **weights}, full=full))


def merge(state: TensorDict) -> dict[str, Tensor]:
    """Return the dense weights, ready for `load_state_dict`.

        W = R + A B,    with a kept compensation c: W = R + c + A B, rounded once

    These are the weights that `call` computes with. So a quantised residual goes in as it is,
    without its master; see `rosa_func.quantised` for both.

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
        return rounding.computed(w).to(w.base.dtype)

    dense = dict(zip(adapted, map_weights(merged, adapted), strict=True))
    rest = {name: t.detach() for name, t in parts.frozen.items() if isinstance(t, Tensor)}
    full = {name: value.detach() for name, value in parts.rounded().items()}
    return {name: dense[name] if name in dense else rest[name] for name in parts.frozen} | full
