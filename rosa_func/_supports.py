"""The places of the largest entries, and how many of them."""

from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor

from rosa_func import keys
from rosa_func.modules import some
from rosa_func.patterns import first_matches
from rosa_func.weight import Parts, Weight
from rosa_func.weight.low_rank import low_rank
from rosa_func.weight.sparse_part import sparse_part, sparse_parts

_ACROSS = ("weight", "model")
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

Density = float | Mapping[str, float]


def densities(parts: Parts) -> dict[str, float]:
    """Return the densities of the sparse parts, by the weights that have one."""
    adapted, found = parts.adapted(), {}
    for name, part in sparse_parts(adapted).items():
        *_, m, n = low_rank(adapted[name]).shape
        found[name] = part.support.shape[-1] / (m * n)
    return found


def budgets(shapes: Mapping[str, torch.Size], density: Density) -> dict[str, int]:
    """Return how many places each matrix has, of the weights that have any."""
    for name, shape in shapes.items():
        if len(shape) < 2 or not shape.numel():
            raise ValueError(f"{name} has scores of shape {tuple(shape)}, which is no matrix")
    if not isinstance(density, Mapping):
        found = dict.fromkeys(shapes, density)
    else:
        named = {name: [name, keys.canonical(name)] for name in shapes}
        found = first_matches(density, named, "densities", "density")
    for value in density.values() if isinstance(density, Mapping) else [density]:
        _check(value)
    return {name: _count(found[name], shape) for name, shape in shapes.items() if name in found}


def _check(density: float) -> None:
    if isinstance(density, bool) or not isinstance(density, int | float):
        raise TypeError(
            f"a density is a number in (0, 1], got {density!r} of type {type(density).__name__}"
        )
    if not 0 < density <= 1:
        raise ValueError(f"a density lies in (0, 1], got {density!r}")


def _count(density: float, shape: torch.Size) -> int:
    # 0.29 of 100 is 28.999999999999996
    return max(1, int(round(density * shape[-2] * shape[-1], 6)))


def largest(scores: Mapping[str, Tensor], density: Density, across: str) -> dict[str, Tensor]:
    """Return the places of the largest scores, each weight's or those of all weights."""
    if across not in _ACROSS:
        raise ValueError(f"across is one of {', '.join(_ACROSS)}, got {across!r}")
    counts = budgets({name: score.shape for name, score in scores.items()}, density)
    if bad := [name for name in counts if not scores[name].isfinite().all()]:
        raise ValueError(f"the scores of {some(bad)} are not finite")
    chosen = {name: scores[name] for name in counts}
    if across == "model":
        return largest_of_all(chosen, counts)
    return {name: largest_of_each(score, counts[name]) for name, score in chosen.items()}


def largest_of_each(scores: Tensor, k: int) -> Tensor:
    """Return the places of the k largest of each matrix, rising; of equal ones the first."""
    matrices = scores.detach().flatten(-2)
    rows = matrices.view(-1, matrices.shape[-1])
    chosen = torch.stack([_largest(row, k) for row in rows])
    return as_index(chosen.view(*matrices.shape[:-1], k), matrices.shape[-1])


def _largest(row: Tensor, k: int) -> Tensor:
    least = row.topk(k, sorted=False).values.min()
    above, equal = (row > least).nonzero().squeeze(1), (row == least).nonzero().squeeze(1)
    return torch.cat([above, equal[: k - len(above)]]).sort().values


def drawn(shapes: Mapping[str, torch.Size], density: Density, key: int) -> dict[str, Tensor]:
    """Return places at random, of each matrix its own."""
    found = {}
    for name, k in budgets(shapes, density).items():
        *lead, m, n = shapes[name]
        each = [
            at_random(m * n, k, keys.generator(key, "support", name, *place))
            for place in (((e,) for e in range(torch.Size(lead).numel())) if lead else [()])
        ]
        found[name] = checked(name, torch.stack(each).view(*lead, k), shapes[name])
    return found


def at_random(size: int, k: int, generator: torch.Generator) -> Tensor:
    """Return k of the places below `size`, every set of them equally likely."""
    if 2 * k > size:
        return torch.randperm(size, generator=generator)[:k]
    # A shuffle of all takes minutes of a vocabulary. No place is preferred, so what is drawn with
    # repeats, until there are enough, and thinned, is as likely to be any set.
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < k:
        found = torch.unique(torch.cat([found, torch.randint(size, (k,), generator=generator)]))
    return found[torch.randperm(len(found), generator=generator)[:k]]


def largest_of_all(scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the places of the largest of all scores, as many as `counts` gives in all.

    Of equal ones the first along the weights, in their order.
    """
    lead = {name: score.shape[:-2].numel() for name, score in scores.items()}
    left = sum(k * lead[name] for name, k in counts.items())
    wide = reduce(torch.promote_types, (score.dtype for score in scores.values()))
    flat = {name: score.detach().flatten().to(wide) for name, score in scores.items()}
    candidates = [row.topk(min(left, len(row)), sorted=False).values for row in flat.values()]
    least = torch.cat([c.cpu() for c in candidates]).topk(left, sorted=False).values.min()
    above = {name: int((row > least.to(row.device)).sum()) for name, row in flat.items()}
    left -= sum(above.values())
    found = {}
    for name, row in flat.items():
        equal = min(left, int((row == least.to(row.device)).sum()))
        left -= equal
        if k := (above[name] + equal) // lead[name]:
            found[name] = largest_of_each(scores[name], k)
    return found


def without_score(scores: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Return the weights with places that were chosen of more whose score is zero, and how many."""
    named = []
    for name, places in found.items():
        zero = scores[name].flatten(-2) == 0
        taken = zero.gather(-1, places.long()).sum(-1)
        if many := int(taken[taken < zero.sum(-1)].sum()):
            named.append(f"{name} ({many} of {places.numel()})")
    return named


def fitting(support: Mapping[str, Tensor], adapted: Mapping[str, Weight]) -> dict[str, Tensor]:
    """Return a support of weights without a sparse part, each sorted, or say what is wrong."""
    if not isinstance(support, Mapping):
        raise TypeError(
            f"a support is a mapping from names to places, got {type(support).__name__}"
        )
    if not support:
        raise KeyError("the support has no weight in it")
    found = {}
    for name, places in support.items():
        if name not in adapted:
            raise KeyError(f"{name} has a support, and is no adapted weight of the state")
        w = adapted[name]
        if sparse_part(w) is not None:
            raise ValueError(f"{name} has a sparse part: sparse.remove(state) merges it into R")
        found[name] = checked(name, places, torch.Size(low_rank(w).shape))
    return found


def checked(name: str, places: Tensor, shape: torch.Size) -> Tensor:
    """Return a support of one weight, sorted, or say what is wrong with it."""
    *lead, m, n = shape
    if not isinstance(places, Tensor) or places.dtype not in _INTEGERS:
        got = places.dtype if isinstance(places, Tensor) else type(places).__name__
        raise TypeError(f"the support of {name} is a tensor of integers, got {got}")
    if list(places.shape[:-1]) != lead or not places.ndim or not places.shape[-1]:
        raise ValueError(
            f"the support of {name} has shape {tuple(places.shape)}, expected "
            f"{(*lead, 'k')} for matrices of {m} x {n}".replace("'", "")
        )
    if places.min() < 0 or places.max() >= m * n:
        raise ValueError(
            f"the support of {name} has places from {int(places.min())} to {int(places.max())}, "
            f"and its {m} x {n} matrix those from 0 to {m * n - 1}"
        )
    rising = places.sort(-1).values
    if twice := rising[..., 1:][rising[..., 1:] == rising[..., :-1]].tolist():
        raise ValueError(f"the support of {name} has the place {twice[0]} more than once")
    return as_index(rising, m * n)


def as_index(places: Tensor, size: int) -> Tensor:
    """Return places in the smallest of the two types of indices that can count to `size`."""
    return places.to(torch.int32 if size < 2**31 else torch.int64)
