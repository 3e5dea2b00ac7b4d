"""Carry an optimizer over a resample, whose state has new leaves."""

import math
import operator
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from rosa_func._carry import carry
from rosa_func._slots import Slots, cast, check_moments, unwrapped
from rosa_func.trainable import refuse_computed
from rosa_func.weight import Term, Weight, read
from rosa_func.weight.layout import leaves
from rosa_func.weight.low_rank import LowRank
from rosa_func.weight.parts import trainable
from rosa_func.weight.sparse_part import SparsePart

_NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


def groups(
    state: TensorDict,
    *,
    input: Mapping[str, Any] | None = _NO_OPTIONS,
    output: Mapping[str, Any] | None = _NO_OPTIONS,
    values: Mapping[str, Any] | None = _NO_OPTIONS,
    full: Mapping[str, Any] | None = _NO_OPTIONS,
) -> list[dict[str, Any]]:
    """Return parameter groups for any `torch.optim` optimizer, each with its options.

        layer(x) = x R + (x input side) output side

    In LoRA+ the two sides have different rates, and that of the output side is higher. In the
    parameter's layout the input side is B for `nn.Linear` (out x in) and A for `Conv1D` (in x
    out); an embedding counts as the transposed linear layer to which it is often tied, so B. Weight
    decay on the factors decays *pretrained* content: set it to 0 there, and where it is wanted give
    it to `full` alone.

    Args:
        state: a state of `init` or `resample`.
        input: options of the group of the factors on the input side, such as `{"lr": 1e-3}`; what
            is not given is the optimizer's default. None leaves them out: they stay as drawn.
        output: the same of the factors on the output side.
        values: the same of the values of sparse parts, see `rosa_func.sparse`.
        full: the same of the tensors trained in full, and of what else trains.

    Returns:
        A group for each of the four that has tensors, in this order.

    Raises:
        ValueError: if an option is `params`, no tensor is left to train, or one is not a leaf.

    Source: Hayou, Ghosh and Yu 2024, "LoRA+".

    Example:
        >>> import rosa_func, torch
        >>> state = rosa_func.init(torch.nn.Sequential(torch.nn.Linear(6, 4)), 2)
        >>> groups = rosa_func.optim.groups(state, output={"lr": 1e-2})
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.0)
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.001, 0.01]
    """
    given = {"input": input, "output": output, "values": values, "full": full}
    for side, options in given.items():
        if options is not None and "params" in options:
            raise ValueError(f"the options of {side} have 'params': groups chooses the tensors")
    refuse_computed(leaves(state))
    chosen: dict[str, list[Tensor]] = {side: [] for side in given}
    parts = read(state)
    for w in parts.adapted().values():
        for term in w.terms:
            for field, leaf in trainable(term).items():
                chosen[_side(term, field, w)].append(leaf)
    chosen["full"] += parts.full.values()
    if not any(chosen[side] for side, options in given.items() if options is not None):
        raise ValueError(
            "no tensor is left to train: give options, not None, for input, output, values or full"
        )
    for side, options in given.items():
        for leaf in chosen[side]:
            leaf.requires_grad_(options is not None)
    return [
        {"params": chosen[side], **options}
        for side, options in given.items()
        if options is not None and chosen[side]
    ]


def _side(term: Term, field: str, w: Weight) -> str:
    """Return the group of a leaf."""
    if isinstance(term, SparsePart):
        return "values"
    if not isinstance(term, LowRank):
        return "full"
    from_the_left = int(w.input_dim) in (0, -2)  # x meets A first
    return "input" if (field == "A") == from_the_left else "output"


def rebind(
    optimizer: torch.optim.Optimizer,
    old_state: TensorDict,
    new_state: TensorDict,
    *,
    moments: str = "reset",
    fraction: float | None = None,
) -> torch.optim.Optimizer:
    """Let an optimizer go on with the leaves of a new state; in place.

    Its groups, their rates and options, and schedulers that hold it stay as they are. A factor
    that was not in the optimizer is not put there. Tensors trained in full keep their moments,
    and so do a pair A, B that is bit for bit what it was and the values of a sparse part on the
    same support, whose gradients are those of the weight before and after. For the others,
    `moments` says:

    - "reset": start again, the step count too. (With the old count, Adam's bias correction would
      be that of a late step, and the first step after a resample several times too large);
    - "project": carry them into the new subspace. The old moments of A and B are those of G B^T
      and A^T G, G being the gradient of W; the new ones are

          M_A' = G B'^T,  M_B' = A'^T G,  where G is the least of all that minimise
          |G B^T - M_A|^2 + |A^T G - M_B|^2

      and for second moments, under gradients G_ij uncorrelated and of equal variance along a row
      (for A) or along a column (for B),

          v_A'[i, k] = |B'_k|^2 sum_l v_A[i, l] / |B|^2,
          v_B'[k, j] = |A'_k|^2 sum_l v_B[l, j] / |A|^2,

      but never less than the square of the new first moment;
    - "keep": hand them on as they are (GaLore does so across its subspaces), quantised ones too;
    - "prune": hand them on with the smallest `fraction` of each set to zero (ReLoRA, which warms up
      again then: where a second moment alone is zeroed, a step is large; see `rewarm`).

    "reset" is the default: where it was measured (E2E, AdamW, rank 4, all at the rate that was best
    for "reset", 95% intervals), "keep" lost more than resampling gains (+0.126 ± 0.013 nats a token
    to "reset"), and "prune" with a warm-up most of it (+0.081 ± 0.033). "project" made no
    difference (-0.025 ± 0.029; examples/experiments/RESULTS.md, `moments`).

    Args:
        optimizer: any whose state is per parameter (of `torch.optim`, all but LBFGS). "project"
            knows SGD, Adam, AdamW, NAdam, RAdam, Adagrad and Adafactor; "prune" these, RMSprop,
            Adadelta and Adamax.
        old_state: the state whose leaves the optimizer has; it may be one that was donated.
        new_state: what `resample(old_state, ...)` returned. Its leaves require a gradient
            afterwards as the old ones did.
        moments: "reset", "project", "keep" or "prune".
        fraction: of the moments to prune, in [0, 1]; only with "prune", and needed there.

    Returns:
        The optimizer.

    Raises:
        ValueError: for an unknown `moments`, a fraction out of place, an optimizer without leaves
            of the old state, a rank that changed under "keep" or "prune", a device that changed,
            LBFGS, a wrapper (SAM, Lookahead) with a state beside that of the optimizer
            inside it, and slots that are named: those that "project" or "prune" does not know;
            those that hold weights, such as the averages of ASGD and schedule-free methods, but
            for "reset"; a step count of a whole group under "reset". Nothing is changed then.
        KeyError: if the states have different names (named).

    Warns:
        UserWarning: if "keep" hands on a slot of a factor's shape whose name it does not know.

    Source: Lialin et al. 2023, "ReLoRA" (pruning); Zhao et al. 2024, "GaLore" (keeping).

    Example:
        >>> import rosa_func, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> state = rosa_func.init(model, 2)
        >>> optimizer = torch.optim.AdamW(rosa_func.parameters(state), 1e-3, weight_decay=0.0)
        >>> new = rosa_func.resample(state, 1)
        >>> optimizer = rosa_func.optim.rebind(optimizer, state, new)
        >>> optimizer.param_groups[0]["params"][0] is new["trainable", "0.weight", "A"]
        True
    """
    slots = carried(optimizer, old_state, new_state, moments=moments, fraction=fraction)
    old, new = leaves(old_state, spent=True), leaves(new_state)
    held = {id(leaf): name for name, leaf in old.items()}
    for group in optimizer.param_groups:
        for place, leaf in enumerate(group["params"]):
            if (name := held.get(id(leaf))) is not None:
                group["params"][place] = new[name]
                optimizer.state.pop(leaf, None)
                if slots[name]:
                    optimizer.state[new[name]] = slots[name]
    for name, leaf in old.items():
        new[name].requires_grad_(leaf.requires_grad)
    return optimizer


def carried(
    optimizer: torch.optim.Optimizer,
    old_state: TensorDict,
    new_state: TensorDict,
    *,
    moments: str,
    fraction: float | None,
) -> dict[str, Slots]:
    """Return what an optimizer of the old leaves is to know of the new ones; see `rebind`."""
    check_moments(moments, fraction)
    optimizer = unwrapped(optimizer)
    old, new = leaves(old_state, spent=True), leaves(new_state)
    if unmatched := set(old).symmetric_difference(new):
        name = min(unmatched)
        raise KeyError(f"{name} is in only one of the two states; was one resampled to the other?")
    held = {id(leaf) for group in optimizer.param_groups for leaf in group["params"]}
    if not any(id(leaf) in held for leaf in old.values()):
        raise ValueError(
            "the optimizer has no leaf of old_state: pass the state that its parameters came from, "
            "before the resample"
        )
    refuse_computed(new)
    for name, leaf in old.items():
        if leaf.device != new[name].device:
            raise ValueError(
                f"{name} went from {leaf.device} to {new[name].device}: move a state before its "
                "optimizer is made"
            )
    slots = {name: dict(optimizer.state.get(leaf, {})) for name, leaf in old.items()}
    drawn = read(new_state).adapted()
    for name, w in read(old_state, spent=True).adapted().items():
        slots |= carry(optimizer, name, w, drawn[name], slots, moments, fraction or 0.0)
    return {name: cast(slots[name], leaf, new[name]) for name, leaf in old.items()}


def rewarm(
    schedule: Callable[[int], float], every: int | Iterable[int], steps: int
) -> Callable[[int], float]:
    """Return the schedule with a linear warm-up after each resample, for `LambdaLR`.

        factor(t) = schedule(t) min(1, (t - s + 1) / (steps + 1)),    s the last resample up to t

    The first cycle is left to the schedule's own warm-up.

    Args:
        schedule: from the step, counted from 0, to a factor of the rate.
        every: steps between two resamples; or, where these differ, the steps of the resamples
            themselves, such as [100, 400].
        steps: of the warm-up, fewer than from one resample to the next; with 0 the schedule is what
            it was.

    Returns:
        A function from the step to a factor.

    Raises:
        ValueError: if `every` is not positive or has a negative step, or if `steps` is negative or
            not below the steps from one resample to the next.
        TypeError: if they are not ints.

    Source: Lialin et al. 2023, "ReLoRA", section 3 (the jagged schedule).

    Example:
        >>> import rosa_func
        >>> factor = rosa_func.optim.rewarm(lambda step: 1.0, every=4, steps=1)
        >>> [factor(step) for step in range(6)]
        [1.0, 1.0, 1.0, 1.0, 0.5, 1.0]
        >>> factor = rosa_func.optim.rewarm(lambda step: 1.0, every=[1, 3], steps=1)
        >>> [factor(step) for step in range(5)]
        [1.0, 0.5, 1.0, 0.5, 1.0]
    """
    steps = operator.index(steps)
    last, shortest = _cycles(every)
    if not 0 <= steps < shortest:
        raise ValueError(
            f"steps lies in [0, {shortest}), the steps from one resample to the next; got {steps}"
        )

    def factor(step: int) -> float:
        since = step - last(step)
        if since == step or since >= steps:
            return schedule(step)
        return schedule(step) * ((since + 1) / (steps + 1))

    return factor


def _cycles(every: int | Iterable[int]) -> tuple[Callable[[int], int], float]:
    """Return what says where the cycle of a step began, and the shortest cycle after the first."""
    if not isinstance(every, Iterable):
        length = operator.index(every)
        if length < 1:
            raise ValueError(f"every is a positive number of steps, got {length}")
        return lambda step: step - step % length, length
    starts = sorted({0, *map(operator.index, every)})
    if starts[0] < 0:
        raise ValueError(f"every has steps counted from 0, got {starts[0]}")
    lengths = [after - before for before, after in pairwise(starts[1:])]
    return lambda step: starts[bisect_right(starts, step) - 1], min(lengths, default=math.inf)
