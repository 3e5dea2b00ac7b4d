"""The leaves of a state that train, and how many values they have."""

from collections.abc import Mapping
from typing import NamedTuple

from tensordict import TensorDict
from torch import Tensor

from rosa_func.weight import layout, read
from rosa_func.weight.parts import Weight, trainable


def named_parameters(state: TensorDict) -> dict[str, Tensor]:
    """Return the trainable leaves by name, so that groups of them can have different rates.

    Which these are, and what is set on them, is as in `parameters`.

    Args:
        state: a state of `init` or `resample`.

    Returns:
        {"h.0.attn.c_attn.weight.A": m x r, "h.0.attn.c_attn.weight.B": r x n, ...}

    Raises:
        KeyError: if an entry of the state is missing (named).
        ValueError: if a tensor that trains is not a leaf (named), or nothing trains.

    Example:
        >>> import rosa_func, torch
        >>> state = rosa_func.init(torch.nn.Sequential(torch.nn.Linear(6, 4)), 2)
        >>> list(rosa_func.named_parameters(state))
        ['0.weight.A', '0.weight.B']
        >>> groups = rosa_func.optim.groups(state, input=None)
        >>> list(rosa_func.named_parameters(state))
        ['0.weight.A']
    """
    named = layout.leaves(state)
    refuse_computed(named)
    if not any(leaf.numel() for leaf in named.values()):
        raise ValueError(
            "nothing in the state trains: its ranks are 0, so give it a sparse part, "
            "rosa_func.sparse.add(state, support), or tensors in `train`"
        )
    if not any(leaf.requires_grad for leaf in named.values()):
        for leaf in named.values():
            leaf.requires_grad_(True)
    return {name: leaf for name, leaf in named.items() if leaf.requires_grad}


def parameters(state: TensorDict) -> list[Tensor]:
    """Return the trainable leaves, for `torch.optim`, with `requires_grad` set.

    They are the state's own tensors, the same objects each time, so an optimizer's steps show in
    the state. Move the state to its device first: `state.to(...)` makes new tensors. Mind that
    weight decay on A and B decays *pretrained* content: set it to 0.

    Where some leaves require a gradient already, these are returned alone, and the others stay
    frozen: `optim.groups` with None for a side has left them out.

    Args:
        state: a state of `init` or `resample`.

    Returns:
        The factors A and B of each adapted weight, and the tensors trained in full.

    Raises:
        KeyError: if an entry of the state is missing (named).
        ValueError: if a tensor that trains is not a leaf (named), as in a copy of a state whose
            leaves require a gradient: make it by `state.detach().clone()`.

    Example:
        >>> import rosa_func, torch
        >>> state = rosa_func.init(torch.nn.Sequential(torch.nn.Linear(6, 4)), 2)
        >>> optimizer = torch.optim.AdamW(rosa_func.parameters(state), 1e-3, weight_decay=0.0)
    """
    return list(named_parameters(state).values())


def refuse_computed(named: Mapping[str, Tensor]) -> None:
    """Refuse tensors that autograd computed from others: they get no gradient of their own."""
    for name, tensor in named.items():
        if not tensor.is_leaf:
            raise ValueError(
                f"{name} is not a leaf, so no optimizer can train it: it was computed from a "
                "tensor that requires a gradient, as in a copy of a state (.clone(), .to(), "
                "copy.deepcopy) made after `parameters`; copy it by state.detach().clone()"
            )


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
    parts = read(state)
    weights: dict[str, tuple[int, int]] = {}
    for name, value in parts.frozen.items():
        if isinstance(value, Weight):
            trained = sum(t.numel() for term in value.terms for t in trainable(term).values())
            weights[name] = (trained, value.shape.numel())
        else:
            weights[name] = (0, value.numel())
    weights |= {name: (value.numel(), value.numel()) for name, value in parts.full.items()}
    numbers = list(weights.values())
    return Count(sum(n for n, _ in numbers), sum(n for _, n in numbers), weights)
