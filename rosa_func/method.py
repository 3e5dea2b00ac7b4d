"""`init` and `resample` with their options bound."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from tensordict import TensorDict

from rosa_func import samplers
from rosa_func.samplers import Sampler
from rosa_func.state import init, resample
from rosa_func.targets import Rank, Targets


class Method(NamedTuple):
    """`init` and `resample` with their options bound, see `method`."""

    init: Callable[..., TensorDict]
    resample: Callable[..., TensorDict]


def method(
    r: Rank,
    *,
    sampler: Sampler = samplers.random,
    targets: Targets = None,
    train: str | Iterable[str] = (),
    exact: bool | None = None,
) -> Method:
    """Bind the options of `init` and `resample` once, as optax binds init and update.

        method(r, **options).init(model, key=0)      = init(model, r, key=0, **options)
        method(r, **options).resample(state, key)    = resample(state, key, r=r, sampler=sampler)

    Args:
        r: the rank, as in `init`.
        sampler: for the first draw and for those after it.
        targets: as in `init`.
        train: as in `init`.
        exact: as in `init`.

    Returns:
        A named pair of functions.

    Example:
        >>> import rosa_func, torch
        >>> pissa = rosa_func.method(2, sampler=rosa_func.samplers.top)
        >>> state = pissa.init(torch.nn.Sequential(torch.nn.Linear(6, 4)))
        >>> state = pissa.resample(state, 1)
    """
    return Method(
        init=partial(init, r=r, sampler=sampler, targets=targets, train=train, exact=exact),
        resample=partial(resample, r=r, sampler=sampler),
    )
