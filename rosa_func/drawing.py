"""A draw: new factors for one weight, and for all of them at once."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from rosa_func import keys, samplers
from rosa_func.extras import needs
from rosa_func.samplers import Sampler, Site
from rosa_func.weight import Base, Term, Weight
from rosa_func.weight.keeping import Kept
from rosa_func.weight.low_rank import LowRank
from rosa_func.weight.parallel import map_weights
from rosa_func.weight.parts import mapped
from rosa_func.weight.past import with_past
from rosa_func.weight.rounding import aligned, factor_dtype, split

# (done, total, name) is called after each weight; or a bar, or nothing.
Progress = bool | Callable[[int, int, str], object]


class Draw(NamedTuple):
    """How the factors of one weight are drawn.

    Attributes:
        name: of the weight.
        r: the rank.
        sampler: of `samplers`, or one like them.
        input_dim: the dimension that meets the input; negative for a batch of matrices.
        generator: (*place) -> the source of randomness of the matrix at that place of a batch, or
            () -> that of the only one.
        kept: how what rounding takes is kept, None for not at all.
    """

    name: str
    r: int
    sampler: Sampler
    input_dim: int
    generator: Callable[..., torch.Generator]
    kept: Kept | None


class NotFiniteError(ValueError):
    """A weight has NaN or infinite values."""


def check_draw(key: int, sampler: Sampler, progress: Progress = False) -> None:
    """Refuse a key, a sampler or a progress of the wrong type."""
    keys.check_key(key)
    samplers.check_sampler(sampler)
    if not isinstance(progress, bool) and not callable(progress):
        raise TypeError(
            f"progress is True, False or a function of (done, total, name), got {progress!r}"
        )


def draw(
    how: Draw, W: Tensor, like: Base, terms: Iterable[Term] = (), *, own: bool = False
) -> Weight:
    """Draw the factors of W and split it.

    Args:
        how: the draw.
        W: the weight, in the dtype of `like` or a wider one.
        like: how the residual is to be stored.
        terms: what the weight was made of, if anything: the terms that are not drawn start again.
        own: whether R may be written over W.

    Raises:
        NotFiniteError: if W is not finite.
        ValueError: if the decomposition does not converge, or the sampler's factors do not fit.
    """
    factors = _drawn(how, W, like.dtype)
    base, lost = split(W, factors, like, how.kept, own)
    if (like.coarse or like.dtype == torch.float16) and not _all_finite(base.dense()):
        limit = "float16's largest value, 65504; use bfloat16"
        if like.dtype != torch.float16:
            limit = "what float32, in which it is quantised, can hold"
        raise ValueError(f"the residual of {how.name} is beyond {limit}")
    # No views: as long as one is there, so is the memory of what it is a view of.
    base = mapped(base, Tensor.detach, base._fields)
    restarted = tuple(term.restarted() for term in terms if term.restarted is not None)
    input_dim = torch.full((), how.input_dim, device=W.device)  # where all of the weight is
    return Weight(base, (factors, *restarted), input_dim, lost)


def draw_beside(how: Draw, W: Tensor, w: Weight) -> Weight:
    """Draw new factors whose product is zero beside what the weight is; the old ones stay as past.

    It is for a base that takes too much to be stored again. All but the factors goes on as it is.

    Raises:
        NotFiniteError: if W, the weight, is not finite.
        ValueError: as `draw`; or if the product is not zero.
    """
    factors = _drawn(how, W, w.base.dtype)
    if factors.A.any() and factors.B.any():
        raise ValueError(
            f"{how.name} is quantised without a master, and {_called(how.sampler)} takes factors "
            "out of it whose product is not zero: the rest would be quantised again, and the error "
            "of that is added to the last one at each draw. Use init(..., master=...), or a "
            "sampler that leaves the residual as it is, such as samplers.additive"
        )
    return with_past(w, factors)


def draw_all(
    work: Callable[[str], Weight],
    weights: Mapping[str, Weight | torch.device],
    full: dict[str, Tensor],
    progress: Progress = False,
) -> dict[str, Weight]:
    """Return {name: work(name)}; refuse all weights that are not finite at once, `full` too.

    The weights, or where they are, are those of before, for `map_weights`.
    """

    def attempt(name: str) -> Weight | NotFiniteError:
        try:
            return work(name)
        except NotFiniteError as error:
            return error

    with _told(progress, len(weights)) as tell:
        found = dict(zip(weights, map_weights(attempt, weights, tell), strict=True))
    drawn = {name: w for name, w in found.items() if isinstance(w, Weight)}
    refuse_non_finite([name for name in found if name not in drawn], full)
    return drawn


def refuse_non_finite(found: list[str], others: Mapping[str, Tensor]) -> None:
    """Refuse weights that were found not to be finite, and tensors that are not, by name."""
    bad = found + [name for name, value in others.items() if not _all_finite(value.detach())]
    if bad:
        raise ValueError(
            f"{', '.join(bad)}: non-finite values; load other weights, or lower the learning rate"
        )


@contextmanager
def _told(progress: Progress, total: int) -> Iterator[Callable[[str], object]]:
    """Yield what is to be called with each name when its weight is done."""
    if progress is True:
        with needs("examples"):
            from tqdm import tqdm  # type: ignore[import-untyped]
        with tqdm(total=total, unit="weight") as bar:
            yield lambda name: bar.update()
        return
    done = count(1)
    yield lambda name: progress and progress(next(done), total, name)


def _drawn(how: Draw, W: Tensor, dtype: torch.dtype) -> LowRank:
    """Return factors for a weight of that dtype, copied: a sampler may return views of W."""
    if not _all_finite(W):
        raise NotFiniteError(how.name)
    W = W.to(factor_dtype(dtype))
    if how.input_dim >= 0:
        return aligned(LowRank(*_factors(how, W.flatten(1), how.input_dim)))
    batch = W.flatten(0, -3)
    pairs = [_factors(how, M, how.input_dim + 2, place) for place, M in enumerate(batch)]
    A, B = (torch.stack(side) for side in zip(*pairs, strict=True))
    lead = W.shape[:-2]
    return aligned(LowRank(A.view(*lead, *A.shape[1:]), B.view(*lead, *B.shape[1:])))


def _called(sampler: Sampler) -> str:
    return getattr(sampler, "__name__", repr(sampler))


def _factors(how: Draw, W: Tensor, input_dim: int, *place: int) -> tuple[Tensor, Tensor]:
    """Return the sampler's factors of one matrix, checked."""
    if not how.r:  # for a sparse part alone
        return W.new_empty(len(W), 0), W.new_empty(0, W.shape[1])
    site = Site(how.name, input_dim, how.generator(*place))
    try:
        A, B = how.sampler(W, how.r, site)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ValueError(f"the decomposition of {how.name} did not converge: {error}") from error
    if A.shape[1:] != B.shape[:1] or (*A.shape[:1], *B.shape[1:]) != W.shape:
        raise ValueError(
            f"the sampler's factors of {how.name} have shapes {tuple(A.shape)} and "
            f"{tuple(B.shape)}, whose product is not {tuple(W.shape)}"
        )
    if not (_all_finite(A) and _all_finite(B)):
        raise ValueError(
            f"the sampler's factors of {how.name} are not finite: are its values (up to "
            f"{W.abs().max():.3g}) too large to be squared?"
        )
    return A, B


def _all_finite(W: Tensor) -> bool:
    if W.sum().isfinite():  # twice as quick; finite values may overflow in it
        return True
    low, high = W.aminmax()  # one pass without a mask; NaN shows in both
    return bool(low.isfinite() and high.isfinite())
