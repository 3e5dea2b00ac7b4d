"""What a task is to the training loop, and the tasks by name."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tensordict import TensorDict
from torch import Tensor, nn

Forward = Callable[..., Any]  # the model with the weights of the moment
Metrics = dict[str, float]


class Task(NamedTuple):
    """A model, its data, and how they are scored; nothing in it depends on the method."""

    model: nn.Module
    targets: list[str] | None  # the weights that are adapted, as in rosa_func.init
    train: list[str]  # what every method trains in full: a head that starts at random
    batches: Callable[[int], Iterator[Any]]  # from the seed, without end
    loss: Callable[[Forward, Any], Tensor]
    evaluate: Callable[[Forward, str], Metrics]  # of a split; "loss" is what chooses
    generate: Callable[[dict[str, Tensor]], Metrics] | None = None  # from merged weights
    solve: Callable[[TensorDict], None] | None = None  # the factors' exact minimum, in place


def load(setting: dict[str, Any], seed: int, data: Path | None, cache: Path) -> Task:
    """Return the task of an experiment; the seed is that of a new head."""
    from . import glue, regression, text

    kind, _, name = setting["task"].partition("/")
    if kind == "regression":
        return regression.load(name, setting, seed)
    if kind == "glue":
        return glue.load(name, setting, seed, data)
    return text.load(kind, setting, data, cache)
