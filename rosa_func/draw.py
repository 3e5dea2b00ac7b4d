"""A draw: what becomes of one weight, and of all of them at once."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from rosa_func import exact as arithmetic
from rosa_func.layout import Split
from rosa_func.parallel import map_weights
from rosa_func.samplers import Sampler, Site


def check_sampler(sampler: Sampler) -> None:
    """Refuse what cannot be called, such as a sampler's name."""
    if not callable(sampler):
        raise TypeError(f"a sampler is a function such as samplers.random, got {sampler!r}")


def draw(
    W: Tensor,
    r: int,
    sampler: Sampler,
    site: Site,
    dtype: torch.dtype,
    kept: torch.dtype | None,
    own: bool = False,
) -> Split | None:
    """Draw the factors of W and split it, in W's shape; None if W is not finite."""
    if not _all_finite(W):
        return None
    try:
        A, B = sampler(W.flatten(1).to(arithmetic.factor_dtype(dtype)), r, site)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ValueError(f"the decomposition of {site.name} did not converge: {error}") from error
    if A.shape[1:] != B.shape[:1] or (*A.shape[:1], *B.shape[1:]) != W.flatten(1).shape:
        raise ValueError(
            f"the sampler's factors of {site.name} have shapes {tuple(A.shape)} and "
            f"{tuple(B.shape)}, whose product is not {tuple(W.flatten(1).shape)}"
        )
    if not (_all_finite(A) and _all_finite(B)):
        raise ValueError(
            f"the sampler's factors of {site.name} are not finite: are its values (up to "
            f"{W.abs().max():.3g}) too large to be squared?"
        )
    A, B = arithmetic.aligned(A), arithmetic.aligned(B)  # copies: a sampler may return views of W
    R, c = arithmetic.split(W.flatten(1), A, B, dtype, kept, own)
    if dtype == torch.float16 and not _all_finite(R):
        raise ValueError(
            f"the residual of {site.name} is beyond float16's largest value, 65504; use bfloat16"
        )
    return Split(R.view(W.shape), A, B, None if c is None else c.view(W.shape))


def draw_all(
    work: Callable[[str], Split | None], names: Collection[str], full: dict[str, Tensor]
) -> dict[str, Split]:
    """Return {name: work(name)}; refuse all weights that are not finite at once, `full` too."""
    bad = [name for name, value in full.items() if not _all_finite(value)]
    splits = dict(zip(names, map_weights(work, names), strict=True))
    if bad := [*(name for name, split in splits.items() if split is None), *bad]:
        raise ValueError(
            f"{', '.join(bad)}: non-finite values; load other weights, or lower the learning rate"
        )
    return {name: split for name, split in splits.items() if split is not None}


def _all_finite(W: Tensor) -> bool:
    if W.sum().isfinite():  # twice as quick; finite values may overflow in it
        return True
    low, high = W.aminmax()  # one pass without a mask; NaN shows in both
    return bool(low.isfinite() and high.isfinite())
