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
    parts = _detached(parts)
    probes = {name: _probe(w) for name, w in parts.adapted().items()}
    sums = {
        name: torch.zeros(
            probe.zeros.shape,
            dtype=torch.promote_types(probe.zeros.dtype, torch.float32),
            device=probe.zeros.device,
        )
        for name, probe in probes.items()
    }

    def add(leaf: Tensor, into: Tensor) -> None:
        G, leaf.grad = leaf.grad, None  # the next weight's takes the same memory
        if squared:
            G = G.to(into.dtype)  # type: ignore[union-attr]  # 16 bits have no squares of 1e-6
            into.addcmul_(G, G)
        else:
            into.add_(G)  # type: ignore[arg-type]

    for name, probe in probes.items():
        hook: Any = partial(add, into=sums[name])
        probe.zeros.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    weights = {n: w._replace(terms=(*w.terms, probes[n])) for n, w in parts.adapted().items()}
    parts = parts._replace(frozen={**parts.frozen, **weights})
    count = 0
    for batch in batches:
        with torch.enable_grad(), computing_with(model, parts) as computing:
            _checked_loss(loss(computing, batch), count).backward()  # type: ignore[no-untyped-call]
        count += 1
    if not count:
        raise ValueError("batches is empty: scores are means over at least one batch")
    for total in sums.values():
        total.div_(count)
    return {name: total if squared else total.abs_() for name, total in sums.items()}


def _probe(w: Weight) -> Probe:
    return Probe.of(torch.Size(low_rank(w).shape), w.base.dtype, w.base.device)


def _detached(parts: Parts) -> Parts:
    """Return the parts as values, so that no gradient reaches the leaves of a state."""
    weights = {
        name: w._replace(terms=tuple(mapped(t, Tensor.detach, t._fields) for t in w.terms))
        for name, w in parts.adapted().items()
    }
    full = {name: value.detach() for name, value in parts.full.items()}
    return parts._replace(frozen={**parts.frozen, **weights}, full=full)


def _checked_loss(value: Any, place: int) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else value
        raise ValueError(
            f"loss(model, batch) is a scalar tensor that depends on the adapted weights; for batch "
            f"{place} it returned {what!r}"
        )
    if not value.isfinite():
        raise ValueError(f"the loss of batch {place} is {float(value)}")
    return value
