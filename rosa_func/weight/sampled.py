"""Products with W = R + S that form neither the gradient of W nor keep W.

S has values on a fixed support, so the gradient of its values is that of W on the support alone:

    Y = X W,    dS = (X^T dY) on the support
"""

import warnings
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens at a time: their transposes stay in a CPU's cache.
_CHUNK = 256
# Of the entries of a matrix. Above it the whole product is quicker than its entries one by one.
_DENSEST = 0.05


def is_sampled(density: float, device: torch.device) -> bool:
    """Return whether entries of a product are to be computed one by one.

    On a CPU the time of the entries is that of their number: at 0.5% a fifth of that of the whole
    product, at 5% half of it (768 x 3072, one thread, 128 to 2,048 tokens alike;
    `python -m examples.benchmark.robust --parts products`). On other devices the whole product of
    one layer is formed, and its entries gathered.
    """
    return device.type == "cpu" and density <= _DENSEST


def folded(R: Tensor, values: Tensor, support: Tensor) -> Tensor:
    """Return R + S, by differentiable operations; `support` counts along the flat R."""
    index = support.long()  # torch 2.6 differentiates by no other under vmap
    return R.flatten().index_add(0, index, values.to(R.dtype)).view(R.shape)


def entries(left: Tensor, right: Tensor, support: Tensor) -> Tensor:
    """Return left^T right on a support, for `left` of tokens x m and `right` of tokens x n.

    It is differentiable, and works under the transforms of torch.func. Sums are in float32 at
    least.
    """
    found: Tensor = _Entries.apply(left, right, support)  # type: ignore[no-untyped-call]
    return found


def product(x: Tensor, R: Tensor, values: Tensor, support: Tensor, flipped: bool) -> Tensor:
    """Return x (R + S), or x (R + S)^T, as `entries` does."""
    if torch.compiler.is_compiling():
        return _product(x, folded(R, values, support), flipped)
    out: Tensor = _Product.apply(x, R, values, support, flipped)  # type: ignore[no-untyped-call]
    return out


def _product(x: Tensor, W: Tensor, flipped: bool) -> Tensor:
    return F.linear(x, W) if flipped else x @ W


def entries_of_the_whole(left: Tensor, right: Tensor, support: Tensor) -> Tensor:
    """Return `entries` of the product formed as a whole."""
    return (left.mT @ right).flatten().index_select(0, support)


def entries_one_by_one(left: Tensor, right: Tensor, support: Tensor) -> Tensor:
    """Return `entries`, forming no others."""
    _warn_of_beta()
    m, n = left.shape[1], right.shape[1]
    wide = torch.promote_types(left.dtype, torch.float32)
    starts = torch.arange(0, m * n + 1, n, dtype=support.dtype, device=support.device)
    rows = torch.searchsorted(support, starts, out_int32=support.dtype == torch.int32)
    sums = torch.zeros(len(support), dtype=wide, device=left.device)
    chosen = torch.sparse_csr_tensor(rows, support % n, sums, (m, n), check_invariants=False)
    # The transposes are written over each other: fresh memory costs as much as the arithmetic.
    width = min(_CHUNK, len(left))
    columns = left.new_empty(m, width, dtype=wide), right.new_empty(n, width, dtype=wide)
    for parts in zip(torch.split(left, _CHUNK), torch.split(right, _CHUNK), strict=True):
        a, b = (
            whole[:, : len(part)].copy_(part.mT) for whole, part in zip(columns, parts, strict=True)
        )
        chosen = torch.sparse.sampled_addmm(chosen, a, b.mT)
    return chosen.values().to(left.dtype)


@cache
def _warn_of_beta() -> None:
    """Let torch say now, unheard, what it says once: that sparse tensors are in beta, unchecked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = torch.zeros(1, 1).to_sparse_csr()
        torch.sparse.sampled_addmm(empty, torch.ones(1, 1), torch.ones(1, 1)).values()
        torch.sparse_csr_tensor(empty.crow_indices(), empty.col_indices(), empty.values(), (1, 1))


class _Entries(torch.autograd.Function):
    """See `entries`."""

    @staticmethod
    def forward(left: Tensor, right: Tensor, support: Tensor) -> Tensor:
        density = len(support) / (left.shape[1] * right.shape[1])
        way = entries_one_by_one if is_sampled(density, left.device) else entries_of_the_whole
        return way(left, right, support)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        left, right, support = ctx.saved_tensors
        D = folded(left.new_zeros(left.shape[1], right.shape[1]), d, support)
        return right @ D.mT, left @ D, None

    @staticmethod
    def jvp(ctx: Any, left_tangent: Any, right_tangent: Any, _: Any) -> Tensor:
        left, right, support = ctx.saved_tensors
        pairs = (left_tangent, right), (left, right_tangent)
        return sum(entries(*pair, support) for pair in pairs if None not in pair)  # type: ignore[return-value]

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        return _each(_Entries, info, in_dims, args)


class _Product(torch.autograd.Function):
    """See `product`. References alone are saved; R + S is computed again in backward."""

    @staticmethod
    def forward(x: Tensor, R: Tensor, values: Tensor, support: Tensor, flipped: bool) -> Tensor:
        return _product(x, folded(R, values, support), flipped)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.flipped = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, R, values, support = ctx.saved_tensors
        left, right = (d, x) if ctx.flipped else (x, d)
        needs_x, needs_R, needs_values, *_ = ctx.needs_input_grad
        d_x = _product(d, folded(R, values, support), not ctx.flipped) if needs_x else None
        d_values = entries(left, right, support).to(values.dtype) if needs_values else None
        return d_x, left.mT @ right if needs_R else None, d_values, None, None

    @staticmethod
    def jvp(ctx: Any, x_: Any, R_: Any, values_: Any, *_: Any) -> Tensor:
        x, R, values, support = ctx.saved_tensors
        W_ = torch.zeros_like(R) if R_ is None else R_
        if values_ is not None:
            W_ = folded(W_, values_, support)
        out = _product(x, W_, ctx.flipped)
        if x_ is not None:
            out = out + _product(x_, folded(R, values, support), ctx.flipped)
        return out

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        x, *rest = args
        if in_dims[1:4] != (None, None, None):
            return _each(_Product, info, in_dims, args)
        x = x.movedim(in_dims[0], 0)  # one weight for many inputs: one product
        out = _Product.apply(x.flatten(0, 1), *rest)  # type: ignore[no-untyped-call]
        return out.unflatten(0, x.shape[:2]), 0


def _each(function: Any, info: Any, in_dims: Any, args: Any) -> tuple[Tensor, int]:
    """Apply a function to one example after another."""
    examples = (
        [a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)]
        for i in range(info.batch_size)
    )
    return torch.stack([function.apply(*example) for example in examples]), 0
