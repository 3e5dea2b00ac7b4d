"""A matrix as a product of the smallest rank."""

from typing import NamedTuple

import torch
from torch import Tensor


class Factored(NamedTuple):
    """D = A B + E, and |E| / |W| in float64."""

    A: Tensor
    B: Tensor
    error: Tensor


def factored(
    D: Tensor, size: Tensor, *, tol: float, rank: int | None, dtype: torch.dtype
) -> Factored:
    """Return D = A B + E with as few columns in A as the tolerance allows, or `rank` of them.

    Args:
        D: m x n, float64, or a batch of such matrices, which get one rank.
        size: |W|, to which tol and the error are relative; one for each matrix of a batch.
        tol: the largest |E| / |W|.
        rank: in place of tol.
        dtype: of A and B.
    """
    tall = D if D.shape[-2] <= D.shape[-1] else D.mT
    # Eigenvectors of the Gram matrix are singular vectors; what each of them carries is measured
    # on D itself, since small eigenvalues are too inexact to be judged by.
    U = torch.linalg.eigh(tall @ tall.mT)[1].flip(-1)
    energy = (U.mT @ tall).square().sum(-1)
    order = energy.argsort(dim=-1, descending=True, stable=True)
    U, energy = U.take_along_dim(order.unsqueeze(-2), -1), energy.take_along_dim(order, -1)
    left = energy.flip(-1).cumsum(-1).flip(-1)  # what is lost with k kept, for k = 0, 1, ...
    wanted = (left > (tol * size).square().unsqueeze(-1)).sum(-1)
    k = int(wanted.max()) if rank is None else min(rank, energy.shape[-1])
    A = U[..., :k]
    B = A.mT @ tall
    norms = B.norm(dim=-1).sqrt()
    scale = torch.where(norms > 0, norms, 1.0)
    A, B = A * scale.unsqueeze(-2), B / scale.unsqueeze(-1)
    if tall is not D:
        A, B = B.mT, A.mT
    A, B = A.to(dtype).contiguous(), B.to(dtype).contiguous()
    lost = (D - A.double() @ B.double()).norm(dim=(-2, -1))
    return Factored(A, B, lost / torch.where(size > 0, size, 1.0))
