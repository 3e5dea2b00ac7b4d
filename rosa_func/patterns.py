"""Patterns of names, and ranks by pattern.

A pattern is a name or a part of a path, with wildcards or without, and means parameters, or
modules, which stand for all that is in them.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeVar

Rank = int | float | Mapping[str, int | float]
T = TypeVar("T")
Named = Mapping[str, Collection[str]]  # {a parameter's name: all its names}
_REGULAR_EXPRESSION = re.compile(r"[\\^$|(){}+]|^\.\*")


def ranks(r: Rank, named: Named) -> dict[str, int | float]:
    """Return what r says of each of these weights: the first pattern that means it counts.

    Raises:
        ValueError: if a pattern means none of them, or one of them has no pattern.
        TypeError: if a pattern is not a string.
    """
    if not isinstance(r, Mapping):
        return dict.fromkeys(named, r)
    found = first_matches(r, named, "ranks", "r")
    if missing := [name for name in named if name not in found]:
        raise ValueError(
            f"no pattern of r={dict(r)!r} matches {missing[0]}; add a last pattern '*' for the rest"
        )
    return found


def first_matches(given: Mapping[str, T], named: Named, what: str, argument: str) -> dict[str, T]:
    """Return what the first pattern that means it says of each weight that any pattern means.

    Args:
        given: {pattern: value}.
        named: the weights.
        what: the values are, for errors.
        argument: in which they were given, for errors.
    """
    found: dict[str, T] = {}
    for pattern, value in given.items():
        if not isinstance(pattern, str):
            raise TypeError(f"a mapping of {what} has patterns as its keys, got {pattern!r}")
        meant = select(named, pattern)
        if not meant:
            raise ValueError(f"{pattern!r} in {argument} {matches_nothing(pattern, named)}")
        found = {**dict.fromkeys(meant, value), **found}
    return found


def rank(r: int | float, name: str, shape: tuple[int, int]) -> int:
    """Resolve r for a weight of that name, whose matrix is of that shape."""
    limit = min(shape)
    if isinstance(r, bool) or not isinstance(r, int | float):
        raise TypeError(
            f"a rank is an int or a fraction in (0, 1), got {r!r} of type {type(r).__name__}"
        )
    if isinstance(r, float):
        if not 0 < r < 1:
            raise ValueError(
                f"a fractional rank lies in (0, 1), got {r!r}; pass an int for a rank as such"
            )
        return max(1, int(round(r * limit, 9)))  # 0.29 of 100 is 28.999999999999996
    if r < 0:
        raise ValueError(f"a rank is at least 0, got {r}")
    if r > limit:
        raise ValueError(
            f"rank {r} is larger than min{shape} = {limit} of {name}: give it a smaller rank, as "
            f"in r={{{name!r}: {limit}, '*': {r}}}, or all weights a fraction, or leave it out, in "
            f"init by exclude={name!r}"
        )
    return r


def listed(given: Any, argument: str) -> list[str]:
    """Return the strings given for an argument, or say what is wrong with them."""
    patterns = [given] if isinstance(given, str) else given
    if not isinstance(patterns, Iterable):
        either = " or a predicate (name, module) -> bool" if argument == "targets" else ""
        raise TypeError(f"{argument} takes a string or strings{either}, got {given!r}")
    patterns = list(patterns)
    if wrong := [p for p in patterns if not isinstance(p, str)]:
        raise TypeError(
            f"{argument} takes strings, got {wrong[0]!r} of type {type(wrong[0]).__name__}"
        )
    return patterns


def select(named: Named, pattern: str) -> list[str]:
    """Return the parameters that the pattern means: one alone if it is its full name."""
    exact = [name for name, aliases in named.items() if pattern in aliases]
    return exact or [
        name for name, aliases in named.items() if any(means(pattern, alias) for alias in aliases)
    ]


def means(pattern: str, name: str) -> bool:
    """Return whether a pattern fits the parameter of that name, or a module that it is in.

    It fits whole parts of a path: the beginning may be left out, so "attn" and "h.0.attn" fit
    modules, and "attn.c_attn.weight" a parameter. `*`, `?` and `[...]` are those of fnmatch.
    """
    return fnmatchcase(f".{name}.", f"*.{pattern}.*")


def matches_nothing(pattern: str, named: Named) -> str:
    """Say so, and what to write, or the closest of what would have matched."""
    if "," in pattern:
        pieces = [piece.strip() for piece in pattern.split(",")]
        return f"is one string, and matches no parameter: pass a list of names, {pieces}"
    if _REGULAR_EXPRESSION.search(pattern):
        return (
            "matches no parameter: it looks like a regular expression, and is not read as one; "
            "pass names, or patterns in which * stands for anything (targets also takes a "
            "predicate (name, module) -> bool)"
        )
    names = list(dict.fromkeys(alias for aliases in named.values() for alias in aliases))
    unnumbered = {re.split(r"(?:^|\.)\d+\.", name)[-1] for name in names}
    paths = (path.split(".") for path in unnumbered)
    ends = {".".join(parts[i:]) for parts in paths for i in range(len(parts))}
    parts = {part for name in names for part in name.split(".") if not part.isdigit()}
    shorter = ends if "*" in pattern or "." in pattern else parts
    near = difflib.get_close_matches(pattern, [*sorted(shorter), *names], n=3, cutoff=0.0)
    return f"matches no parameter; the closest names are {', '.join(near)}"
