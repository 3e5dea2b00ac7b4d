"""The layout of a state: the only code that knows where a state holds what.

frozen        {name: tensor}, or a TensorDict of the fields of a base that is not dense
trainable     {name: TensorDict of the fields of the terms that train}, or a plain tensor
input_dim     {name: the dimension that meets the input}
fixed         {name: TensorDict of the fields of the terms that do not train}, where there are
compensation  {name: what rounding took from the residual}, where it is kept
model_dtype   {name: a zero of the model's dtype}, for each tensor that is trained in full in
              another dtype: in float32, where the model has 16 bits
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from rosa_func._torch import is_old_dynamo
from rosa_func.weight.dense import Dense
from rosa_func.weight.gathering import is_sharded
from rosa_func.weight.keeping import kept_as
from rosa_func.weight.low_rank import LowRank
from rosa_func.weight.parts import Base, Term, Weight, fixed, trainable
from rosa_func.weight.past import Past
from rosa_func.weight.quantised import QUANTISED
from rosa_func.weight.rounding import compensation_dtype
from rosa_func.weight.sharded import Sharded, refuse_gathers, spread
from rosa_func.weight.sparse_part import SparsePart
from rosa_func.weight.spent import refuse_spent

# A new kind is a file beside these, and an entry here. Terms are folded in this order.
BASES: list[Any] = [Dense, *QUANTISED.values()]
TERMS: list[Any] = [LowRank, Past, SparsePart]

Path = tuple[str, ...]
_REQUIRED = ("frozen", "trainable", "input_dim")


class Parts(NamedTuple):
    """What a state holds, in its own order.

    Attributes:
        frozen: adapted weights, and the tensors that do not train.
        full: the tensors that are trained in full, as they train.
        dtypes: the model's dtypes of those in `full` that train in another.
    """

    frozen: dict[str, Weight | Tensor]
    full: dict[str, Tensor]
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({})

    def adapted(self) -> dict[str, Weight]:
        """Return the adapted weights."""
        return {name: w for name, w in self.frozen.items() if isinstance(w, Weight)}

    def composable(self) -> dict[str, Weight]:
        """Return the weights that stand-ins are made of: adapted ones, and all that are sharded."""
        sharded = {
            name: Weight(_base(name, t), (), torch.tensor(0))
            for name, t in self.frozen.items()
            if isinstance(t, Tensor) and is_sharded(t)
        }
        return {**self.adapted(), **sharded}  # `|` is unknown to old compilers

    def with_adapted(self, weights: Mapping[str, Weight]) -> "Parts":
        """Return what there is with other weights in the place of those of these names."""
        return self._replace(frozen={**self.frozen, **weights})

    def rounded(self) -> dict[str, Tensor]:
        """Return the tensors that are trained in full in the model's dtypes, differentiably."""
        cast = {name: self.full[name].to(dtype) for name, dtype in self.dtypes.items()}
        return {**self.full, **cast}


def read(state: TensorDict, *, spent: bool = False) -> Parts:
    """Read a state, after making sure that no entry is missing and that all fit together.

    Args:
        state: what `write` returned.
        spent: whether one that was donated will do, of which only the factors have values.

    Raises:
        TypeError: if it is not a TensorDict.
        KeyError: if an entry is missing, or there is one too many (named).
        ValueError: if shapes do not fit, or a tensor was donated (named).
    """
    if not isinstance(state, TensorDictBase):
        raise TypeError(f"the state is a TensorDict, got {type(state).__name__}")
    branches: dict[str, dict[str, Any]] = {
        branch: dict(value.items())  # type: ignore[union-attr]
        for branch, value in state.items()
    }
    if missing := [branch for branch in _REQUIRED if branch not in branches]:
        raise KeyError(f"the state has no entry {missing[0]!r}; it has {sorted(branches)}")
    frozen, dims = branches["frozen"], branches["input_dim"]
    supports, lost = branches.get("fixed", {}), branches.get("compensation", {})
    full: dict[str, Tensor] = {}
    adapted: dict[str, Weight] = {}
    is_checked = not is_old_dynamo()
    for name, value in branches["trainable"].items():
        if isinstance(value, Tensor):
            full[name] = value
            if not spent:
                refuse_spent((value,))
            continue
        if name not in dims:
            raise KeyError(f"the state lacks {name} in input_dim")
        if name not in frozen:
            raise KeyError(f"the state lacks the frozen residual of {name}")
        fields = dict(value.items())
        if name in supports:
            fields.update(supports[name].items())
        base, terms = _base(name, frozen[name]), _terms(name, fields)
        adapted[name] = Weight(base, terms, dims[name], lost.get(name))
        if not spent:
            refuse_spent((*base, adapted[name].lost))  # type: ignore[misc]
        if is_checked:
            _check_shapes(name, adapted[name])
    if len(dims) > len(adapted):
        name = next(name for name in dims if name not in adapted)
        raise KeyError(f"the state lacks {name} in trainable")
    if is_checked and "compensation" in branches:
        _check_compensation(adapted)
    for what, names in (("fixed entries", supports), ("a compensation", lost)):
        if stray := [name for name in names if name not in adapted]:
            raise KeyError(f"the state has {what} of {stray[0]}, which is not adapted")
    dtypes = {name: like.dtype for name, like in branches.get("model_dtype", {}).items()}
    if stray := [name for name in dtypes if name not in full]:
        raise KeyError(f"the state has a model_dtype of {stray[0]}, which is not trained in full")
    return Parts({**frozen, **adapted}, full, dtypes)


def write(parts: Parts) -> TensorDict:
    """Put a state together; `read` reverses it."""
    branches: dict[str, dict[str, Any]] = {branch: {} for branch in _REQUIRED}
    support: dict[str, Any] = {}
    compensation: dict[str, Any] = {}
    for name, value in parts.frozen.items():
        if not isinstance(value, Weight):
            branches["frozen"][name] = value
            continue
        base: Any = value.base
        base = base.stored if isinstance(base, Sharded) else base
        stored = base.R if isinstance(base, Dense) else TensorDict(base._asdict())
        branches["frozen"][name] = stored
        branches["input_dim"][name] = value.input_dim
        for term in value.terms:
            branches["trainable"].setdefault(name, {}).update(trainable(term))
            if term.fixed:
                support.setdefault(name, {}).update(fixed(term))
        if value.lost is not None:
            compensation[name] = value.lost
    branches["trainable"] |= parts.full
    if support:
        branches["fixed"] = support
    if compensation:
        branches["compensation"] = compensation
    if parts.dtypes:
        branches["model_dtype"] = {
            name: parts.full[name].new_zeros((), dtype=dtype)
            for name, dtype in parts.dtypes.items()
        }
    return TensorDict({branch: TensorDict(values) for branch, values in branches.items()})


def leaves(state: TensorDict, *, spent: bool = False) -> dict[str, Tensor]:
    """Return the trainable leaves by name, such as "0.weight.A", as they are."""
    found: dict[str, Tensor] = {}
    parts = read(state, spent=spent)
    for name, w in parts.adapted().items():
        for term in w.terms:
            found |= {f"{name}.{field}": value for field, value in trainable(term).items()}
    return found | parts.full


def entries(state: TensorDict) -> dict[Path, Tensor]:
    """Return every tensor of a state by its path, such as ("trainable", "0.weight", "A")."""
    found: dict[Path, Tensor] = {}
    for key in state.keys(include_nested=True, leaves_only=True):
        tensor: Any = state[key]
        found[key if isinstance(key, tuple) else (key,)] = tensor
    return found


def from_entries(entries: Mapping[Path, Tensor]) -> TensorDict:
    """Return the state with these tensors; `entries` reverses it."""
    nested: dict[str, Any] = {branch: {} for branch in _REQUIRED}
    for (*parents, last), tensor in entries.items():
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = tensor
    return TensorDict(nested)


def trains(path: Path) -> bool:
    """Return whether the tensor at that path of a state is one that trains."""
    return path[0] == "trainable"


def is_frozen(path: Path) -> bool:
    """Return whether a tensor at that path can be sharded: one of a residual or compensation."""
    return path[0] in ("frozen", "compensation")


def refuse_sharded(state: TensorDict, taker: str) -> None:
    """Refuse a state of which each process has a share only."""
    for path, tensor in entries(state).items():
        if is_sharded(tensor):
            raise ValueError(
                f"{path[1]} is sharded, and {taker} takes whole weights: gather the state first, "
                "in all processes, rosa_func.distributed.gather(state)"
            )


def is_drawn(path: Path) -> bool:
    """Return whether a draw makes another tensor for that path of an adapted weight."""
    return path[0] != "input_dim"


def is_compensation(path: Path) -> bool:
    """Return whether the tensor at that path is what rounding took, which may have no elements."""
    return path[0] == "compensation"


def kept_apart(state: TensorDict) -> set[Path]:
    """Return the paths of what rounding took that is not kept beside its weight."""
    kept = {name: kept_as(w) for name, w in read(state).adapted().items()}
    return {("compensation", name) for name, how in kept.items() if how and how.place}


def past_paths(state: TensorDict) -> list[Path]:
    """Return the paths of past products, which a resample of a quantised weight adds or extends."""
    return [("fixed", name, field) for name in read(state).adapted() for field in Past._fields]


def _base(name: str, stored: Any) -> Base:
    base = _stored_base(name, stored)
    if is_old_dynamo():  # which follows no fields of a NamedTuple
        if is_sharded(stored):
            refuse_gathers(name)
        return base
    return Sharded(base, name) if spread(base) else base


def _stored_base(name: str, stored: Any) -> Base:
    if isinstance(stored, Tensor):
        return Dense(stored)
    fields = dict(stored.items())
    for kind in BASES:
        if sorted(kind._fields) == sorted(fields):  # compilers do not know all of sets
            base: Base = kind(**fields)
            return base
    known = " or ".join(", ".join(kind._fields) for kind in BASES if kind is not Dense)
    raise KeyError(
        f"the residual of {name} has the entries {sorted(fields)}, not a tensor"
        + (f" or {known}" if known else "")
    )


def _terms(name: str, fields: dict[str, Tensor]) -> tuple[Term, ...]:
    """Return the terms that these fields make up, each field in one of them."""
    terms, left = [], dict(fields)
    for kind in TERMS:
        values = [left.pop(field) for field in kind._fields if field in left]
        if len(values) == len(kind._fields):
            terms.append(kind(*values))
        elif values:
            missing = next(field for field in kind._fields if field not in fields)
            what = "factor" if kind is LowRank else "entry"
            raise KeyError(f"the state lacks the {what} {missing} of {name}")
    if left or not terms:
        known = "; ".join(", ".join(kind._fields) for kind in TERMS)
        raise KeyError(f"{name} has the entries {sorted(fields)}, which are not those of {known}")
    return tuple(terms)


def _check_shapes(name: str, w: Weight) -> None:
    for term in w.terms:
        if wrong := term.check(w.shape):
            raise ValueError(f"{name}: {wrong} its residual's {tuple(w.shape)}")
    if w.lost is not None and w.lost.numel() and w.lost.shape != w.shape:
        raise ValueError(
            f"the compensation of {name} has shape {tuple(w.lost.shape)}, "
            f"its residual {tuple(w.shape)}"
        )


def _check_compensation(adapted: dict[str, Weight]) -> None:
    """Refuse a compensation that lacks a weight: it is kept for all of them, or all of 16 bit."""
    kept = {name: w.lost.dtype for name, w in adapted.items() if w.lost is not None}
    dtypes = {name: w.base.dtype for name, w in adapted.items()}
    is_of_all = any(  # as a master is, and all that rounding took
        adapted[name].base.coarse or dtype == compensation_dtype(dtypes[name], True)
        for name, dtype in kept.items()
    )
    default = [name for name, dtype in dtypes.items() if compensation_dtype(dtype, None)]
    expected = default if kept and not is_of_all else list(adapted)
    if missing := [name for name in expected if name not in kept]:
        raise KeyError(
            f"the state lacks the compensation of {missing[0]} (a state of several dtypes cannot "
            "be cast by .to(dtype): cast the model, and use init)"
        )
