"""What a resample takes beside SVDs, and what it cannot take less than: a part of speed.py."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import rosa_func
from examples.benchmark.contenders import (
    Settings,
    Times,
    gpt2,
    interleave,
    rosa_of,
    timed,
    tokens,
    train_step,
)
from rosa_func.weight.parallel import HOST, map_weights


class Split(NamedTuple):
    """A weight as a residual and factors of its shape, and what a draw needs of its shorter side.

    Q is a subspace of that side, M the weight with it first, G = M M^T.
    """

    R: Tensor
    A: Tensor
    B: Tensor
    Q: Tensor
    M: Tensor
    G: Tensor


def resample(s: Settings) -> Times:
    """Time resamples, SVDs of the same weights with as many threads, their limits, E2E's step."""
    rank, model = s.ranks[0], gpt2(s.model)
    state = rosa_func.init(model, rank)
    weights = rosa_func.merge(state)
    numbers = rosa_func.count(state).weights
    matrices = [weights[name] for name, (trained, _) in numbers.items() if trained]
    splits = [split(W, rank) for W in matrices]
    projection = partial(rosa_func.resample, sampler=rosa_func.samplers.projection)
    work = {
        "svd": partial(timed, lambda: [torch.linalg.svd(W, full_matrices=False) for W in matrices]),
        "random": partial(timed, partial(rosa_func.resample, state, 1)),
        "projection": partial(timed, partial(projection, state, 1)),
        "eigh and products": partial(timed, partial(each, eigh_and_products, splits)),
        "products": partial(timed, partial(each, products, splits)),
        # 8 references of E2E, taken to be 64 tokens each with their padding.
        "step": partial(train_step, rosa_of(model, state), *tokens(model.config, (8, 64))),
    }
    # No warm-up: `init` has decomposed the same matrices, and a round of SVDs takes long.
    return interleave(work, max(3, s.rounds // 2), 0, "resample")


def split(W: Tensor, rank: int) -> Split:
    """Return W with factors of ones, whose values no time depends on."""
    m, n = W.shape
    Q = torch.linalg.qr(torch.randn(min(m, n), rank, generator=torch.Generator().manual_seed(0)))[0]
    M = W if m <= n else W.T
    return Split(W, W.new_ones(m, rank), W.new_ones(rank, n), Q, M, M @ M.T)


def each(work: Callable[[Split], object], splits: list[Split]) -> None:
    """Do it to all of them as a resample does, with as many threads."""
    map_weights(lambda place: work(splits[place]), dict.fromkeys(range(len(splits)), HOST))


def products(of: Split) -> Tensor:
    """Merge into fresh memory, project, and split: the arithmetic of a resample by `projection`."""
    W = torch.addmm(of.R, of.A, of.B)
    A, B = (of.Q, of.Q.T @ W) if of.M is of.R else (W @ of.Q, of.Q.T)
    return torch.addmm(W, A, B, alpha=-1, out=W)


def eigh_and_products(of: Split) -> Tensor:
    """Do the arithmetic of a resample by `random`, of the Gram matrix no more than half."""
    _ = of.M[: len(of.M) // 2] @ of.M.T  # the rest of it is mirrored
    torch.linalg.eigh(of.G)
    return products(of)
