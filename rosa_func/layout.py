"""What a state holds of each weight, read and checked."""

from typing import NamedTuple

from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from rosa_func.exact import compensation_dtype


class Split(NamedTuple):
    """One weight after a draw: all that the state holds of it."""

    R: Tensor
    A: Tensor
    B: Tensor
    c: Tensor | None


def adapted(state: TensorDict) -> list[str]:
    """Return the adapted names, after making sure that no entry of the state is missing."""
    if not isinstance(state, TensorDictBase):
        raise TypeError(f"the state is a TensorDict, got {type(state).__name__}")
    if missing := [
        part for part in ("frozen", "trainable", "input_dim") if part not in state.keys()
    ]:
        raise KeyError(f"the state has no entry {missing[0]!r}; it has {sorted(state.keys())}")
    names = [name for name, value in state["trainable"].items() if not isinstance(value, Tensor)]
    if unmatched := set(names).symmetric_difference(state["input_dim"].keys()):
        name = min(unmatched)
        raise KeyError(f"the state lacks {name} in {'input_dim' if name in names else 'trainable'}")
    for name in names:
        for factor in ("A", "B"):
            if factor not in state["trainable", name].keys():
                raise KeyError(f"the state lacks the factor {factor} of {name}")
        if name not in state["frozen"].keys():
            raise KeyError(f"the state lacks the frozen residual of {name}")
    if "compensation" in state.keys():
        _check_compensation(state, names)
    return names


def check(state: TensorDict) -> list[str]:
    """Return the adapted names, after making sure that what belongs to each fits together."""
    names = adapted(state)
    for name in names:
        R, A, B, c = parts(state, name)
        if A.shape[1] != B.shape[0] or (A.shape[0], B.shape[1]) != R.shape:
            raise ValueError(
                f"the factors of {name} have shapes {tuple(A.shape)} and {tuple(B.shape)}, "
                f"which do not multiply to its residual's {tuple(R.shape)}"
            )
        if c is not None and c.shape != R.shape:
            raise ValueError(
                f"the compensation of {name} has shape {tuple(c.shape)}, "
                f"its residual {tuple(R.shape)}"
            )
    return names


def parts(state: TensorDict, name: str) -> Split:
    """Return what the state holds of an adapted weight, R and c as matrices."""
    R, factors = state["frozen", name], state["trainable", name]
    c = state["compensation"].get(name, None) if "compensation" in state.keys() else None
    c = None if c is None else c.flatten(1)
    return Split(R.detach().flatten(1), factors["A"].detach(), factors["B"].detach(), c)


def _check_compensation(state: TensorDict, names: list[str]) -> None:
    """Refuse a compensation that lacks a weight: it is kept for all of them, or all of 16 bit."""
    kept = dict(state["compensation"].items())
    default = {n: compensation_dtype(state["frozen", n].dtype, None) for n in names}
    as_default = kept and all(c.dtype == default.get(n) for n, c in kept.items())
    expected = [n for n in names if default[n]] if as_default else names
    if missing := [name for name in expected if name not in kept]:
        raise KeyError(f"the state lacks the compensation of {missing[0]}")
