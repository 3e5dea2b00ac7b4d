"""The leaves of a state that train."""

from tensordict import TensorDict
from torch import Tensor

from rosa_func import layout


def leaves(state: TensorDict) -> dict[str, Tensor]:
    """Return the trainable leaves by name, as they are."""
    layout.adapted(state)  # or an error that names what is missing
    found: dict[str, Tensor] = {}
    for name, value in state["trainable"].items():
        if isinstance(value, Tensor):
            found[name] = value
        else:
            found.update({f"{name}.{factor}": value[factor] for factor in ("A", "B")})
    return found


def named_parameters(state: TensorDict) -> dict[str, Tensor]:
    """Return the trainable leaves by name, so that groups of them can have rates of their own.

    Sets `requires_grad` on them, as `parameters` does.

    Args:
        state: a state of `init` or `resample`.

    Returns:
        {"h.0.attn.c_attn.weight.A": m x r, "h.0.attn.c_attn.weight.B": r x n, ...}

    Raises:
        KeyError: if an entry of the state is missing (named).

    Example:
        >>> import rosa_func, torch
        >>> state = rosa_func.init(torch.nn.Sequential(torch.nn.Linear(6, 4)), 2)
        >>> list(rosa_func.named_parameters(state))
        ['0.weight.A', '0.weight.B']
    """
    named = leaves(state)
    for leaf in named.values():
        leaf.requires_grad_(True)
    return named


def parameters(state: TensorDict) -> list[Tensor]:
    """Return the trainable leaves, for `torch.optim`, with `requires_grad` set.

    They are the state's own tensors, the same objects each time, so an optimizer's steps show in
    the state. Move the state to its device first: `state.to(...)` makes new tensors. Mind that
    weight decay on A and B decays *pretrained* content: set it to 0.

    Args:
        state: a state of `init` or `resample`.

    Returns:
        The factors A and B of each adapted weight, and the tensors trained in full.

    Raises:
        KeyError: if an entry of the state is missing (named).

    Example:
        >>> import rosa_func, torch
        >>> state = rosa_func.init(torch.nn.Sequential(torch.nn.Linear(6, 4)), 2)
        >>> optimizer = torch.optim.AdamW(rosa_func.parameters(state), 1e-3, weight_decay=0.0)
    """
    return list(named_parameters(state).values())
