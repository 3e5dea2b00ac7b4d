"""Patterns of names, and ranks by pattern."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from rosa_func.modules import Parameter

Rank = int | float | Mapping[str, int | float]


def rank(r: Rank, names: list[str], shape: tuple[int, int]) -> int:
    """Resolve r for a weight of these names, whose matrix is of that shape."""
    if isinstance(r, Mapping):
        for pattern, value in r.items():
            if any(names_weight(pattern, name) for name in names):
                return rank(value, names, shape)
        raise ValueError(
            f"no pattern of r={dict(r)!r} matches {names[0]}; add a last pattern '*' for the rest"
        )
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
    if r < 1:
        raise ValueError(f"a rank is at least 1, got {r}")
    if r > limit:
        raise ValueError(
            f"rank {r} is larger than min{shape} = {limit} of {names[0]}; "
            "pass a smaller rank, a fraction, or a mapping from patterns to ranks"
        )
    return r


def check_rank_patterns(r: Rank | None, names: Iterable[str]) -> None:
    """Refuse a mapping of ranks in which a pattern matches none of the adapted weights."""
    names = list(names)
    for pattern in r if isinstance(r, Mapping) else ():
        if not isinstance(pattern, str):
            raise TypeError(f"a mapping of ranks has patterns as its keys, got {pattern!r}")
        if not any(names_weight(pattern, name) for name in names):
            raise ValueError(f"{pattern!r} in r {matches_nothing(pattern, names, names_weight)}")


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


def select(
    parameters: dict[str, Parameter], pattern: str, matches: Callable[[str, str], bool]
) -> list[str]:
    """Return the parameters that have a name that the pattern matches."""
    return [
        name for name, p in parameters.items() if any(matches(pattern, alias) for alias in p.names)
    ]


def names_weight(pattern: str, name: str) -> bool:
    """Match "c_attn" or "attn.c_attn" to the weight of each module whose name ends so.

    With * or a dot also by fnmatch, to the name of the parameter or of its module.
    """
    if name == pattern or f".{name}".endswith(f".{pattern}.weight"):
        return True
    module = name.removesuffix(".weight")
    return ("*" in pattern or "." in pattern) and any(
        fnmatchcase(which, pattern) for which in {name, module}
    )


def names_part(pattern: str, name: str) -> bool:
    """Match a plain name to any part of the path, so to all of a module's parameters."""
    if "*" in pattern or "." in pattern:
        return fnmatchcase(name, pattern)
    return pattern in name.split(".")


def matches_nothing(pattern: str, names: Iterable[str], matches: Callable[[str, str], bool]) -> str:
    """Say so, with the closest of what would have matched."""
    names = list(names)
    parts = {part for name in names for part in name.split(".") if not part.isdigit()}
    plain = [part for part in sorted(parts) if any(matches(part, name) for name in names)]
    candidates = names if "*" in pattern or "." in pattern else [*plain, *names]
    near = difflib.get_close_matches(pattern, candidates, n=3, cutoff=0.0)
    return f"matches no parameter; the closest names are {', '.join(near)}"
