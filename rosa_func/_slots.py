"""What an optimizer keeps for a tensor: slots, known by their names."""

import re
import warnings
from typing import Any

import torch
from torch import Tensor

Slots = dict[str, Any]

FIRST = ("exp_avg", "momentum_buffer")
SECOND = ("exp_avg_sq", "max_exp_avg_sq", "sum")
FACTORED = ("row_var", "col_var")  # Adafactor: the means of a second moment over either dimension
COUNTS = ("step", "mu_product")

_MODES = ("reset", "project", "keep", "prune")
_PROJECTED = {*FIRST, *SECOND, *FACTORED}
_PRUNED = {*_PROJECTED, "square_avg", "grad_avg", "acc_delta", "exp_inf"}
# Moments, rates and gradients of the usual optimizers: what `keep` hands on without a word.
_KEPT = {*_PRUNED, "prev", "step_size", "momentum", "m", "v", "state1", "state2"}
# Weights and averages of them: of ASGD, Lookahead, schedule-free methods, Prodigy, SAM.
_WEIGHTS = {"ax", "ema", "kahan_comp", "old_p", "p0", "slow", "w0", "x", "x0", "x_k", "y", "z"}
_WORDS_OF_WEIGHTS = re.compile(
    "(^|_)(anchors?|lookahead|master|params?|shadow|slow_buff(er)?|swa|weights?)(_|$)"
)
_GROUP_COUNTS = ("step", "k")  # steps that an optimizer counts for a whole group
_NEW = "make a new optimizer of parameters(new_state)"
_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_moments(moments: str, fraction: float | None) -> None:
    """Refuse what `rebind` does not know."""
    if moments not in _MODES:
        raise ValueError(f"moments is one of {', '.join(_MODES)}, got {moments!r}")
    if (fraction is not None) != (moments == "prune"):
        raise ValueError(
            f"a fraction goes with moments='prune' and only there, got fraction={fraction!r} "
            f"with moments={moments!r}"
        )
    if fraction is not None and not 0 <= fraction <= 1:
        raise ValueError(f"the fraction to prune lies in [0, 1], got {fraction!r}")


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer that has the slots, after making sure that no other one has some.

    A wrapper such as accelerate's shows the slots of the optimizer inside as its own. Others (SAM,
    Lookahead) keep some beside them.
    """
    name, inside = type(optimizer).__name__, _optimizers_in(optimizer)
    for one in inside:
        if one.state is not optimizer.state:
            raise ValueError(
                f"{name} has a state of its own beside that of the {type(one).__name__} inside it, "
                f"and only one of the two could be carried: {_NEW}"
            )
    if inside:
        return unwrapped(inside[0])
    shared = [f"an entry {key!r}" for key in optimizer.state if not isinstance(key, Tensor)]
    if isinstance(optimizer, torch.optim.LBFGS):
        shared = ["one history"]
    if shared:
        raise ValueError(
            f"{name} keeps {shared[0]} of all parameters together, which no new subspace can take "
            f"over: make a new {name} of parameters(new_state)"
        )
    return optimizer  # type: ignore[no-any-return]


def _optimizers_in(optimizer: Any) -> list[torch.optim.Optimizer]:
    found: list[torch.optim.Optimizer] = []
    for value in vars(optimizer).values():
        values = value.values() if isinstance(value, dict) else value
        each = values if isinstance(value, dict | list | tuple) else [value]
        found += [one for one in each if isinstance(one, torch.optim.Optimizer)]
    return found


def check_slots(
    optimizer: torch.optim.Optimizer, name: str, leaf: Tensor, slots: Slots, moments: str
) -> None:
    """Refuse the slots of a leaf with which a mode would do something wrong, by name."""
    kind = type(optimizer).__name__
    count = _shared_count(optimizer, leaf)
    if moments == "reset":
        if count:
            raise ValueError(
                f"{kind} counts the steps of a whole group in {count!r}, so moments='reset' would "
                "start moments again under an old count, and the next step would be several times "
                f"too large: {_NEW}"
            )
        return
    for slot, value in sorted(slots.items()):
        if _is_weight(slot, value, leaf):
            raise ValueError(
                f"{slot!r} of {kind} (for {name}) holds weights of the old subspace, not moments, "
                f"and moments={moments!r} would mix two subspaces: "
                + (_NEW if count else "pass moments='reset'")
            )
    for slot, value in sorted(slots.items()):
        if moments == "keep":
            if slot not in _KEPT and isinstance(value, Tensor) and value.shape == leaf.shape:
                warnings.warn(
                    f"moments='keep' hands {slot!r} of {kind} on as a moment, without knowing it: "
                    "if it holds weights or an average of them, pass moments='reset'",
                    stacklevel=5,  # who called rebind
                )
        elif not _is_known(slot, value, moments):
            what = value.dtype if type(value) is Tensor else f"type {type(value).__name__}"
            raise ValueError(
                f"moments={moments!r} does not know what {slot!r} of this optimizer is (for "
                f"{name}, of {what}); pass moments='keep', which hands it on as it is"
                + ("" if count else ", or 'reset'")
            )


def are_moments(slots: Slots) -> bool:
    """Return whether all slots are moments of gradients, and counts of their steps."""
    return all(slot in COUNTS or slot in _PRUNED for slot in slots)


def _is_weight(slot: str, value: Any, leaf: Tensor) -> bool:
    as_large = isinstance(value, Tensor) and value.numel() == leaf.numel()
    return slot in _WEIGHTS or (as_large and _WORDS_OF_WEIGHTS.search(slot) is not None)


def _is_known(slot: str, value: Any, moments: str) -> bool:
    """Return whether a mode that changes moments knows what to do with a slot."""
    if moments == "project" and slot in COUNTS:
        return True
    if moments == "prune" and not _has_entries(value):
        return True
    known = _PRUNED if moments == "prune" else _PROJECTED
    is_plain = value is None or (type(value) is Tensor and value.dtype in _PLAIN)
    return slot in known and is_plain


def _has_entries(value: Any) -> bool:
    return value.ndim > 0 if isinstance(value, Tensor) else isinstance(value, dict | list | tuple)


def _shared_count(optimizer: torch.optim.Optimizer, leaf: Tensor) -> str | None:
    """Return the name under which the group of a leaf counts the steps of all its tensors."""
    for group in optimizer.param_groups:
        if any(one is leaf for one in group["params"]):
            return next((count for count in _GROUP_COUNTS if group.get(count)), None)
    return None


def fresh(optimizer: torch.optim.Optimizer, old: Tensor, new: Tensor) -> Slots:
    """Return what a new optimizer would know: only Adagrad knows something, its first sum."""
    if not isinstance(optimizer, torch.optim.Adagrad) or old not in optimizer.state:
        return {}
    (group,) = (g for g in optimizer.param_groups if any(p is old for p in g["params"]))
    initial = group["initial_accumulator_value"]
    made = torch.optim.Adagrad([new], initial_accumulator_value=initial)
    return dict(made.state[new])


def cast(slots: Slots, old: Tensor, new: Tensor) -> Slots:
    """Return the slots in the dtype of a new leaf where they had that of the old one."""
    if old.dtype == new.dtype:
        return slots
    return {
        slot: value.to(new.dtype)
        if type(value) is Tensor and value.ndim and value.dtype == old.dtype
        else value
        for slot, value in slots.items()
    }
