"""`init` and `resample` with their options bound."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, NoReturn

from tensordict import TensorDict

from rosa_func import peft_names, samplers
from rosa_func.cycle import resample
from rosa_func.drawing import Progress
from rosa_func.patterns import Rank
from rosa_func.samplers import Sampler
from rosa_func.starting import init
from rosa_func.storage import Master
from rosa_func.targeting import Targets
from rosa_func.weight.keeping import Place


class Method(NamedTuple):
    """`init` and `resample` with their options bound, see `method`."""

    init: Callable[..., TensorDict]
    resample: Callable[..., TensorDict]


def method(
    r: Rank | None,
    *,
    sampler: Sampler = samplers.random,
    targets: Targets = None,
    train: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    exact: bool | None = None,
    compensation: Place = None,
    donate: bool = False,
    progress: Progress = False,
    quantize: str | None = None,
    master: Master = None,
    **others: NoReturn,
) -> Method:
    """Bind the options of `init` and `resample` once, as optax binds init and update.

        method(r, **options).init(model, key=0)      = init(model, r, key=0, **options)
        method(r, **options).resample(state, key)    = resample(state, key, r=r, sampler=sampler)

    Args:
        r: the rank, as in `init`. None, where nothing is adapted.
        sampler: for the first draw and for those after it.
        targets: as in `init`.
        train: as in `init`.
        exclude: as in `init`.
        exact: as in `init`.
        compensation: as in `init`.
        donate: as in `init` and `resample`, for both.
        progress: as in `init`, for both.
        quantize: as in `init`.
        master: as in `init`.
        others: none, as in `init`.

    Returns:
        A named pair of functions.

    Example:
        >>> import rosa_func, torch
        >>> pissa = rosa_func.method(2, sampler=rosa_func.samplers.top)
        >>> state = pissa.init(torch.nn.Sequential(torch.nn.Linear(6, 4)))
        >>> state = pissa.resample(state, 1)
    """
    peft_names.refuse(others)
    return Method(
        init=partial(
            init,
            r=r,
            sampler=sampler,
            targets=targets,
            train=train,
            exclude=exclude,
            exact=exact,
            compensation=compensation,
            donate=donate,
            progress=progress,
            quantize=quantize,
            master=master,
        ),
        resample=partial(resample, r=r, sampler=sampler, donate=donate, progress=progress),
    )
