"""What a resample takes beside SVDs, and what it cannot take less than: a part of benchmark.py."""

from functools import partial

import torch
from benchmark_contenders import (
    Settings,
    Times,
    gpt2,
    interleave,
    rosa_of,
    timed,
    tokens,
    train_step,
)
from torch import Tensor

import rosa_func
from rosa_func.parallel import map_weights


def resample(s: Settings) -> Times:
    """Time resamples, SVDs of the same weights with as many threads, their limits, E2E's step."""
    rank, model = s.ranks[0], gpt2(s.model)
    state = rosa_func.init(model, rank)
    weights = rosa_func.merge(state)
    matrices = [weights[name] for name in state["input_dim"].keys()]
    grams, split = [gram(W) for W in matrices], [parts(W, rank) for W in matrices]
    projection = partial(rosa_func.resample, sampler=rosa_func.samplers.projection)
    work = {
        "svd": partial(timed, lambda: [torch.linalg.svd(W, full_matrices=False) for W in matrices]),
        "random": partial(timed, partial(rosa_func.resample, state, 1)),
        "projection": partial(timed, partial(projection, state, 1)),
        "eigh": partial(timed, partial(map_weights, torch.linalg.eigh, grams)),
        "products": partial(timed, partial(map_weights, products, split)),
        # 8 references of E2E, taken to be 64 tokens each with their padding.
        "step": partial(train_step, rosa_of(model, state), *tokens(model.config, (8, 64))),
    }
    # No warm-up: `init` has decomposed the same matrices, and a round of SVDs takes long.
    return interleave(work, max(3, s.rounds // 2), 0, "resample")


def gram(W: Tensor) -> Tensor:
    """Return the matrix that `samplers.random` decomposes."""
    short = W if W.shape[0] <= W.shape[1] else W.T
    return short @ short.T


def parts(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return W as a residual, factors of its shape, and a subspace of its shorter side."""
    m, n = W.shape
    Q = torch.linalg.qr(torch.randn(min(m, n), rank, generator=torch.Generator().manual_seed(0)))[0]
    return W, W.new_ones(m, rank), W.new_ones(rank, n), Q


def products(of: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Merge into fresh memory, project, and split: the arithmetic of a resample by projection."""
    R, A, B, Q = of
    W = torch.addmm(R, A, B)
    A, B = (Q, Q.T @ W) if R.shape[0] <= R.shape[1] else (W @ Q, Q.T)
    return torch.addmm(W, A, B, alpha=-1, out=W)
