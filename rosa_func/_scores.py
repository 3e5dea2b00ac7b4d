"""The gradients of whole weights, one at a time, and their sums over batches."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rosa_func.forward import computing_with
from rosa_func.weight import Parts, Weight
from rosa_func.weight.low_rank import low_rank
from rosa_func.weight.parts import mapped
from rosa_func.weight.probe import Probe

_HOW = ("mean_square", "mean_abs")


def check_how(how: str) -> None:
    """Refuse another word for how gradients become scores."""
    if how not in _HOW:
        raise ValueError(f"how is one of {', '.join(_HOW)}, got {how!r}")


def scored(
    model: nn.Module,
    parts: Parts,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    squared: bool,
) -> dict[str, Tensor]:
    """Return the mean square of each weight's gradients, or the absolute mean."""
    probes = {name: _probe(w) for name, w in parts.adapted().items()}
    sums = {name: _wide_zeros(probe) for name, probe in probes.items()}
    seen: set[str] = set()  # in this batch

    def take(leaf: Tensor, name: str) -> None:
        G, leaf.grad = leaf.grad, None  # the next weight's takes the same memory
        G = G.to(sums[name].dtype)  # type: ignore[union-attr]  # 16 bits have no squares of 1e-6
        if not squared:
            sums[name].add_(G)
        elif name not in seen:
            seen.add(name)
            sums[name].addcmul_(G, G)
        else:  # the square of a sum is not the sum of squares
            raise ValueError(
                f"the gradient of {name} comes in several pieces: let gradient checkpointing have "
                'use_reentrant=False, or score by how="mean_abs"'
            )

    for name, probe in probes.items():
        hook: Any = partial(take, name=name)
        probe.zeros.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    probed = _with_probes(parts, probes)
    count = 0
    for batch in batches:
        with torch.enable_grad(), computing_with(model, probed) as computing:
            _checked(loss(computing, batch), count).backward()  # type: ignore[no-untyped-call]
        seen.clear()
        count += 1
    if not count:
        raise ValueError("batches is empty: scores are means over at least one batch")
    for total in sums.values():
        total.div_(count)
    return {name: total if squared else total.abs_() for name, total in sums.items()}


def _probe(w: Weight) -> Probe:
    return Probe.of(torch.Size(low_rank(w).shape), w.base.dtype, w.base.device)


def _wide_zeros(probe: Probe) -> Tensor:
    zeros = probe.zeros
    dtype = torch.promote_types(zeros.dtype, torch.float32)
    return torch.zeros(zeros.shape, dtype=dtype, device=zeros.device)


def _with_probes(parts: Parts, probes: dict[str, Probe]) -> Parts:
    """Return the parts as values, so that gradients reach the probes and no leaf of a state."""
    weights = {
        name: w._replace(
            terms=(*(mapped(t, Tensor.detach, t._fields) for t in w.terms), probes[name])
        )
        for name, w in parts.adapted().items()
    }
    full = {name: value.detach() for name, value in parts.full.items()}
    return parts.with_adapted(weights)._replace(full=full)


def _checked(value: Any, place: int) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(
            f"loss(model, batch) is a scalar tensor; for batch {place} it was {value!r}"
        )
    if value.ndim:
        raise ValueError(
            f"loss(model, batch) is a scalar; for batch {place} it has shape {tuple(value.shape)}"
        )
    if not value.requires_grad:
        raise ValueError(
            f"the loss of batch {place}, {value.item()}, does not depend on the adapted weights: "
            "let it compute with the model that it is given, with gradients"
        )
    if not value.isfinite():
        raise ValueError(f"the loss of batch {place} is {value.detach().item()}")
    return value
