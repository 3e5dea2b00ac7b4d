"""How many values train, and out of how many."""

from typing import NamedTuple

from tensordict import TensorDict
from torch import Tensor

from rosa_func import layout


class Count(NamedTuple):
    """Numbers of values, see `count`; `str()` makes a table of them."""

    trainable: int
    total: int
    weights: dict[str, tuple[int, int]]

    def __str__(self) -> str:
        """Make a table: a line for all, then one for each weight that trains."""
        rows = [("all", self.trainable, self.total)]
        rows += [(name, *numbers) for name, numbers in self.weights.items() if numbers[0]]
        width = max(len(name) for name, _, _ in rows)
        return "\n".join(
            f"{name:{width}} {trainable:>14,} of {total:>14,} {trainable / total:8.3%}"
            for name, trainable, total in rows
        )


def count(state: TensorDict) -> Count:
    """Count the values that train, and those of the model.

        an adapted m x n weight trains r (m + n) values of its m n

    Args:
        state: a state of `init` or `resample`.

    Returns:
        `trainable` and `total` (the values of the merged model, its persistent buffers
        included), and `weights` {name: (trainable, total)}. A full-rank pair has more values than
        its weight, so the first number may be the larger one.

    Raises:
        KeyError: if an entry of the state is missing (named).

    Example:
        >>> import rosa_func, torch
        >>> state = rosa_func.init(torch.nn.Sequential(torch.nn.Linear(60, 40)), 2)
        >>> print(rosa_func.count(state))
        all                 200 of          2,440   8.197%
        0.weight            200 of          2,400   8.333%
    """
    layout.adapted(state)  # or an error that names what is missing
    weights = {name: (0, tensor.numel()) for name, tensor in state["frozen"].items()}
    for name, value in state["trainable"].items():
        if isinstance(value, Tensor):
            weights[name] = (value.numel(), value.numel())
        else:
            factors = value["A"].numel() + value["B"].numel()
            weights[name] = (factors, weights[name][1])
    trainable, total = (sum(column) for column in zip(*weights.values(), strict=True))
    return Count(trainable, total, weights)
