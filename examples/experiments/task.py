"""What a task is to the training loop."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tensordict import TensorDict
from torch import Tensor, nn

Forward = Callable[..., Any]  # the model with the weights of the moment
Metrics = dict[str, float]


class Task(NamedTuple):
    """A model, its data, and how they are scored; nothing in it depends on the method."""

    model: nn.Module
    train: list[str]  # what every method trains in full: a head that starts at random
    batches: Callable[[int], Iterator[Any]]  # from the seed, without end
    loss: Callable[[Forward, Any], Tensor]
    evaluate: Callable[[Forward, str], Metrics]  # of a split; "loss" is what chooses
    generate: Callable[[nn.Module], Metrics] | None = None  # by a merged model
    solve: Callable[[TensorDict], None] | None = None  # the factors' exact minimum, in place
    digest: str = ""  # of the data, where it does not come from the seed


def digest(*values: Any) -> str:
    """Return a digest of rows, names and numbers."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]
