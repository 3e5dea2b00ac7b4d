"""Products with a residual that has to be formed for them, and is formed again in backward.

So nothing of its size is kept: not in a transform of torch.func, and not under autocast either.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rosa_func._torch import is_autocast, without_autocast
from rosa_func.weight.dense import Dense
from rosa_func.weight.parts import Base, remade


def applied(base: Base, x: Tensor, flipped: bool, bias: Tensor | None) -> Tensor:
    """Return x R + bias, or x R^T + bias, differentiably."""
    if base.apply is not None:
        return base.apply(x, flipped, bias)
    # A compiler chooses itself what is computed again.
    if torch.compiler.is_compiling() or any(field.requires_grad for field in base):  # type: ignore[attr-defined]
        return Dense(base.dense()).apply(x, flipped, bias)
    dtype = base.dtype
    if is_autocast(x.device) and dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    with without_autocast(x.device):
        out: Tensor = _Formed.apply(partial(remade, base), dtype, flipped, x, *base)  # type: ignore[misc, no-untyped-call]
        return out if bias is None else out + bias


class _Formed(torch.autograd.Function):
    """x R, or x R^T, for a base given by its fields and what makes it of them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(base: Any, dtype: torch.dtype, flipped: bool, x: Tensor, *fields: Tensor) -> Tensor:
        return Dense(base(fields).dense().to(dtype)).apply(x, flipped, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.base, ctx.dtype, ctx.flipped, _, *fields = inputs
        ctx.save_for_backward(*fields)
        ctx.save_for_forward(*fields)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        fields = ctx.saved_tensors
        d_x = _Formed.apply(ctx.base, ctx.dtype, not ctx.flipped, d, *fields)  # type: ignore[no-untyped-call]
        return None, None, None, d_x, *(None for _ in fields)

    @staticmethod
    def jvp(ctx: Any, _base: Any, _dtype: Any, _flipped: Any, x_: Any, *_: Any) -> Any:
        if x_ is None:
            return None
        return _Formed.apply(ctx.base, ctx.dtype, ctx.flipped, x_, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
