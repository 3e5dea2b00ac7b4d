"""Robust adaptation: a sparse part that trains beside the factors, W = R + A B + S."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from rosa_func import keys
from rosa_func._scores import check_how, scored
from rosa_func._supports import Density, densities, drawn, fitting, largest, without_score
from rosa_func.modules import some
from rosa_func.weight import read, write
from rosa_func.weight.low_rank import low_rank
from rosa_func.weight.rounding import absorbed
from rosa_func.weight.sparse_part import sparse_parts, with_zeros


def scores(
    model: nn.Module,
    state: TensorDict,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    how: str = "mean_square",
) -> dict[str, Tensor]:
    """Return how much each entry of the adapted weights matters, by gradients of a few batches.

        mean_square:  score = (1/k) sum_b G_b^2,    mean_abs:  score = |(1/k) sum_b G_b|

    G_b is the gradient of the loss of batch b by the whole weight, at its value of now. In memory
    are one weight's gradient at a time, and the sums of all. The state and its gradients stay as
    they are. A mean of squares depends on how many examples a batch has: small ones have noisier
    gradients, which add to it. Score with the batches of the training.

    Args:
        model: the model, or its `skeleton`.
        state: a state of `init` or `resample`.
        batches: what `loss` takes, one after another.
        loss: (model, batch) -> a scalar. The model is one that computes with the state, in the mode
            of the given one: so in training mode there is dropout.
        how: "mean_square" or "mean_abs".

    Returns:
        {name: m x n} for each adapted weight, in float32 at least: of a convolution m x (the rest),
        of a batch of matrices m x n for each.

    Raises:
        ValueError: if `how` is another word, there is no batch, or the loss is not a scalar that
            depends on an adapted weight, or not finite; if a gradient to be squared comes in
            several pieces, as of a layer that reentrant checkpointing runs twice; or as `call`
            does.
        KeyError, RuntimeError: as `call` does.

    Source: Nikdan et al. 2024, "RoSA", section 4.2.

    Example:
        >>> import rosa_func, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> state, batches = rosa_func.init(model, 2), [torch.ones(3, 6), torch.zeros(3, 6)]
        >>> def loss(model, x):
        ...     return model(x).square().mean()
        >>> scores = rosa_func.sparse.scores(model, state, batches, loss)
        >>> scores["0.weight"].shape
        torch.Size([4, 6])
    """
    check_how(how)
    with torch.inference_mode(False):  # no gradients are there
        return scored(model, read(state), batches, loss, how == "mean_square")


def support(
    scores: Mapping[str, Tensor], density: Density, *, across: str = "weight"
) -> dict[str, Tensor]:
    """Return the places of the largest scores, for `add`.

        k = int(density m n) of the m n entries of a matrix, but at least 1

    Of equal scores the first along the flat matrix are taken, so two processes with the same scores
    find the same.

    Args:
        scores: of `scores`, or of one's own: {name: m x n}, of a batch of matrices m x n for each.
        density: a number in (0, 1]; or a mapping from patterns, as the ranks of `init`, to such
            numbers, the first match counts, and a weight that none matches has no sparse part.
        across: "weight" gives each weight its own k; "model" takes as many in all, wherever they
            are largest, and a weight without any has no sparse part. In a batch each matrix has as
            many as the others, so there the k of each is rounded down.

    Returns:
        {name: k places}, rising, int32 where that can count m n.

    Raises:
        ValueError: for a density out of range, a pattern without a match, scores that are not
            finite or not matrices, or another word for `across`.
        TypeError: for a density or a pattern of another type.

    Warns:
        UserWarning: if places without a score had to do, as in a weight that no gradient reached.

    Source: Nikdan et al. 2024, "RoSA", section 4.2.

    Example:
        >>> import rosa_func, torch
        >>> scores = {"0.weight": torch.tensor([[0.0, 3.0, 1.0], [1.0, 0.0, 2.0]])}
        >>> rosa_func.sparse.support(scores, 0.5)
        {'0.weight': tensor([1, 2, 5], dtype=torch.int32)}
    """
    found = largest(scores, density, across)
    if unscored := without_score(scores, found):
        warnings.warn(
            f"places were chosen though their score is zero, the first along the matrix: in "
            f"{some(unscored)}; score with more batches, or give these weights a lower density",
            stacklevel=2,
        )
    return found


def support_random(state: TensorDict, density: Density, key: int) -> dict[str, Tensor]:
    """Return places at random, every set of them equally likely: the control for `support`.

    Args:
        state: a state of `init` or `resample`.
        density: as in `support`.
        key: any int. Each weight draws from `fold_in(key, "support", name)`, a matrix of a batch
            from that and its place.

    Returns:
        As of `support`.

    Raises:
        ValueError, TypeError: as `support` does; TypeError if the key is not an int.

    Example:
        >>> import rosa_func, torch
        >>> state = rosa_func.init(torch.nn.Sequential(torch.nn.Linear(6, 4)), 2)
        >>> rosa_func.sparse.support_random(state, 0.25, key=0)["0.weight"].shape
        torch.Size([6])
    """
    keys.check_key(key)
    weights = read(state).adapted()
    return drawn({name: torch.Size(low_rank(w).shape) for name, w in weights.items()}, density, key)


def add(state: TensorDict, support: Mapping[str, Tensor]) -> TensorDict:
    """Give weights a sparse part that is zero; the function stays the same, bit for bit.

        W = R + A B    becomes    W = R + A B + S,    S = 0 on a support that stays

    All else is the given state's own, so an optimizer of its leaves need only be told of the new
    ones, {"0.weight.values": k}: see `optim.groups` and `named_parameters`. `resample` merges S
    into R, and goes on with zeros on the same support. For a sparse part alone begin with rank 0,
    `init(model, 0)`.

    Args:
        state: a state of `init` or `resample`.
        support: {name: k places}, of `support`, `support_random` or one's own: k integers, each
            counted along the flat m x n matrix (of a convolution m x the rest), of a batch of
            matrices k for each.

    Returns:
        A new state.

    Raises:
        ValueError: for a weight that has a sparse part already (`remove` it first), and places that
            are of another shape than the weight, out of range or given twice.
        TypeError: for places that are no integers, or no mapping to them.
        KeyError: for a name that is no adapted weight's, or no name at all.

    Source: Nikdan et al. 2024, "RoSA", equation 2.

    Example:
        >>> import rosa_func, torch
        >>> state = rosa_func.init(torch.nn.Sequential(torch.nn.Linear(6, 4)), 2)
        >>> state = rosa_func.sparse.add(state, {"0.weight": torch.tensor([0, 7, 23])})
        >>> list(rosa_func.named_parameters(state))
        ['0.weight.A', '0.weight.B', '0.weight.values']
    """
    parts = read(state)
    adapted = parts.adapted()
    places = fitting(support, adapted)
    new = {name: with_zeros(adapted[name], at) for name, at in places.items()}
    return write(parts.with_adapted(new))


def remove(state: TensorDict) -> TensorDict:
    """Merge the sparse parts into the residuals, and leave them out; the function stays the same.

        W = R + A B + S    becomes    W = R' + A B,    R' = R + S

    What rounding takes is kept where the state has a compensation. To go on with another support,
    `add(remove(state), support)`.

    Args:
        state: a state of `init`, `resample` or `add`.

    Returns:
        A new state; all but the residuals is the given one's own.

    Raises:
        ValueError: if no weight has a sparse part, or one that has is quantised without a master.

    Example:
        >>> import rosa_func, torch
        >>> state = rosa_func.init(torch.nn.Sequential(torch.nn.Linear(6, 4)), 2)
        >>> new = rosa_func.sparse.add(state, rosa_func.sparse.support_random(state, 0.25, key=0))
        >>> list(rosa_func.named_parameters(rosa_func.sparse.remove(new)))
        ['0.weight.A', '0.weight.B']
    """
    parts = read(state)
    adapted = parts.adapted()
    found = sparse_parts(adapted)
    if not found:
        raise ValueError("no weight of the state has a sparse part")
    for name, part in found.items():
        w = adapted[name]
        if w.is_closed() and part.values.any():
            raise ValueError(
                f"{name} is quantised without a master, so its sparse part cannot be merged into "
                "its residual: that would be quantised again. Use init(..., master=...), or keep "
                "the support that there is"
            )
    new = {name: absorbed(adapted[name], part) for name, part in found.items()}
    return write(parts.with_adapted(new))


def move(state: TensorDict, support: Mapping[str, Tensor]) -> TensorDict:
    """Put the sparse parts on another support; the function stays the same.

        W = R + A B + S    becomes    W = R' + A B + S',    R' = R + S,    S' = 0

    This is `add`, after `remove` where there is a sparse part.

    Args:
        state: a state of `init`, `resample` or `add`.
        support: as in `add`. A weight that is not in it has no sparse part any more.

    Returns:
        A new state; all but the residuals and the sparse parts is the given one's own.

    Raises:
        ValueError, TypeError, KeyError: as `add` does.

    Example:
        >>> import rosa_func, torch
        >>> state = rosa_func.init(torch.nn.Sequential(torch.nn.Linear(6, 4)), 2)
        >>> state = rosa_func.sparse.move(state, {"0.weight": torch.tensor([0, 7, 23])})
        >>> state = rosa_func.sparse.move(state, {"0.weight": torch.tensor([5, 6])})
        >>> rosa_func.named_parameters(state)["0.weight.values"].shape
        torch.Size([2])
    """
    return add(remove(state) if densities(read(state)) else state, support)


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
) -> TensorDict:
    """Begin to train a sparse part, where gradients are largest after some low-rank steps.

        support(scores(model, state, batches, loss), density),    added to `state` or to `start`

    The published recipe is 64 steps of the factors alone, this, and then both, with two rates: 7e-4
    for the factors and 2e-4 for the values. It recommends to train from the pretrained weights
    again, so that the first steps find the support and no more: pass them as `start`, and make a
    new optimizer. Without, the leaves of the state go on, and their optimizer is told of the new:

        values = [v for name, v in named_parameters(state).items() if name.endswith(".values")]
        optimizer.add_param_group({"params": values, "lr": 2e-4})

    A sparse part that is there is merged, as by `move`.

    Args:
        model: as in `scores`.
        state: the state after the low-rank steps.
        batches: as in `scores`; those that come next, for instance.
        loss: as in `scores`.
        density: as in `support`; None for as many places as each weight has now.
        start: the state to train from, such as that of `init` with the same key again. None for
            `state` itself.
        how: as in `scores`.
        across: as in `support`.

    Returns:
        The state to go on with, S = 0 in it.

    Raises:
        ValueError: if density is None and there is no sparse part; or as `scores`, `support` and
            `add` do.
        TypeError, KeyError: as these do.

    Source: Nikdan et al. 2024, "RoSA", section 4.2 and algorithm 1.

    Example:
        >>> import rosa_func, torch
        >>> from rosa_func import optim, sparse
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> state, batches = rosa_func.init(model, 2), [torch.ones(3, 6), torch.zeros(3, 6)]
        >>> def loss(model, x):
        ...     return model(x).square().mean()
        >>> # ... some steps of an optimizer of rosa_func.parameters(state), and then
        >>> state = sparse.begin(model, state, batches, loss, 0.25, start=rosa_func.init(model, 2))
        >>> groups = optim.groups(state, values={"lr": 2e-4})
        >>> optimizer = torch.optim.AdamW(groups, lr=7e-4, weight_decay=0.0)
    """
    if density is None and not (density := densities(read(state))):
        raise ValueError("density is None for the places of a sparse part, and the state has none")
    found = support(scores(model, state, batches, loss, how=how), density, across=across)
    return move(state if start is None else start, found)
