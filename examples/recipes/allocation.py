"""Ranks for the weights of a model, dealt out of one budget by what each would gain.

    gain of the k-th rank / (m + n),    gain = the k-th singular value squared

of the gradient of an m x n weight, of the weight, or of any matrix that stands for it.
"""

import heapq
from collections.abc import Mapping

import torch
from torch import Tensor


def spectra(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the squares of the singular values of each matrix, the largest first."""
    return {n: torch.linalg.svdvals(W).square() for n, W in weights.items() if W.ndim == 2}


def dealt(gains: Mapping[str, Tensor], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """Return ranks: each goes where it gains most for its cost, until no other can be paid.

    Args:
        gains: {name: what the first, second, ... rank of this weight gains}, falling.
        costs: {name: values that a rank of this weight trains}.
        budget: values that all may train together.
    """
    ranks = dict.fromkeys(gains, 0)
    queue = [(-float(gain[0]) / costs[name], name) for name, gain in gains.items()]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        if costs[name] > budget:
            continue  # a cheaper one may still be paid
        budget -= costs[name]
        ranks[name] += 1
        if ranks[name] < len(gains[name]):
            heapq.heappush(queue, (-float(gains[name][ranks[name]]) / costs[name], name))
    return ranks
