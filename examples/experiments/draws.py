"""Samplers that the experiments try beside those of the library.

Each is a sampler of the library's form, `sampler(W, r, site) -> (A, B)`. Those that need the
gradient of the loss by the dense weight get it as {name: G}, over a few batches at the draw.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from rosa_func.samplers import Sampler, Site, random


def aligned(gradients: Mapping[str, Tensor]) -> Sampler:
    """Additive, the input side the leading singular directions of G (GaLore, LoRA-GA).

    for W in x out:  G = U S V^T,  A = U_r,  B = 0;    for W out x in:  A = 0,  B = V_r^T
    """

    def sampler(W: Tensor, r: int, site: Site) -> tuple[Tensor, Tensor]:
        G = gradients[site.name].flatten(1).to(W.dtype)
        incoming = G.movedim(site.input_dim, 0)  # in x out
        Q = torch.linalg.svd(incoming, full_matrices=False)[0][:, :r]
        zeros = W.new_zeros(r, incoming.shape[1])
        return (Q, zeros) if site.input_dim == 0 else (zeros.T, Q.T)

    return sampler


def importance(gradients: Mapping[str, Tensor]) -> Sampler:
    """Singular directions of W, drawn in proportion to the energy of the gradient along them.

    p_i ~ |u_i^T G|^2 + |G v_i|^2,  r of them without replacement
    """

    def sampler(W: Tensor, r: int, site: Site) -> tuple[Tensor, Tensor]:
        G = gradients[site.name].flatten(1).to(W.dtype)
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        energy = (U.T @ G).square().sum(1) + (G @ Vh.T).square().sum(0)
        floor = 1e-6 * energy.mean() + torch.finfo(W.dtype).tiny  # every direction can be drawn
        chosen = torch.multinomial((energy + floor).cpu(), r, generator=site.generator)
        root = S[chosen].sqrt()
        return U[:, chosen] * root, root[:, None] * Vh[chosen]

    return sampler


def haar(W: Tensor, r: int, site: Site) -> tuple[Tensor, Tensor]:
    """As `random`, in directions that have nothing to do with W.

    A = P sqrt(S),  B = sqrt(S) Q^T,  P, Q random orthonormal,  S r singular values of W
    """
    S = torch.linalg.svdvals(W)
    order = torch.randperm(len(S), generator=site.generator)
    root = S[order[:r].to(S.device)].sqrt()
    P, Q = (
        torch.linalg.qr(torch.randn(size, r, generator=site.generator).to(W))[0] for size in W.shape
    )
    return P * root, root[:, None] * Q.T


def antisymmetric(W: Tensor, r: int, site: Site) -> tuple[Tensor, Tensor]:
    """Factors of `random`'s norms whose product is zero: r / 2 directions, with both signs.

    A = [A', A'],  B = [B'; -B'],  A' and B' of `random` at rank r / 2
    """
    A, B = random(W, r // 2, site)
    return torch.cat([A, A], 1), torch.cat([B, -B])


def shared(sampler: Sampler, share: float) -> Sampler:
    """Give the input side that power of each term's norm, the output side the rest."""

    def sampled(W: Tensor, r: int, site: Site) -> tuple[Tensor, Tensor]:
        A, B = sampler(W, r, site)
        a, b = torch.linalg.vector_norm(A, dim=0), torch.linalg.vector_norm(B, dim=1)
        of_a = share if site.input_dim == 0 else 1 - share
        scale = torch.where(a * b > 0, (a * b) ** of_a / a, torch.ones_like(a))
        return A * scale, B / scale[:, None]

    return sampled
