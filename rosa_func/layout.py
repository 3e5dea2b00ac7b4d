"""What a state holds of each weight, read and checked."""

from typing import NamedTuple

from tensordict import TensorDict
from torch import Tensor


class Split(NamedTuple):
    """One weight after a draw: all that the state holds of it."""

    R: Tensor
    A: Tensor
    B: Tensor
    c: Tensor | None


def check(state: TensorDict) -> list[str]:
    """Return the adapted names, after making sure that each has its residual and factors."""
    if missing := [
        part for part in ("frozen", "trainable", "input_dim") if part not in state.keys()
    ]:
        raise KeyError(f"the state has no entry {missing[0]!r}; it has {sorted(state.keys())}")
    adapted = [name for name, value in state["trainable"].items() if not isinstance(value, Tensor)]
    if unmatched := set(adapted).symmetric_difference(state["input_dim"].keys()):
        name = min(unmatched)
        raise KeyError(
            f"the state lacks {name} in {'input_dim' if name in adapted else 'trainable'}"
        )
    for name in adapted:
        for factor in ("A", "B"):
            if factor not in state["trainable", name].keys():
                raise KeyError(f"the state lacks the factor {factor} of {name}")
        if name not in state["frozen"].keys():
            raise KeyError(f"the state lacks the frozen residual of {name}")
        R, A, B, _ = parts(state, name)
        if A.shape[1] != B.shape[0] or (A.shape[0], B.shape[1]) != R.shape:
            raise ValueError(
                f"the factors of {name} have shapes {tuple(A.shape)} and {tuple(B.shape)}, "
                f"which do not multiply to its residual's {tuple(R.shape)}"
            )
    return adapted


def parts(state: TensorDict, name: str) -> Split:
    """Return what the state holds of an adapted weight, R and c as matrices."""
    R, factors = state["frozen", name], state["trainable", name]
    c = state["compensation"].get(name, None) if "compensation" in state.keys() else None
    c = None if c is None else c.flatten(1)
    return Split(R.detach().flatten(1), factors["A"].detach(), factors["B"].detach(), c)
