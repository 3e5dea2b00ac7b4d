"""The leading singular directions of a matrix without all the others."""

import torch
from torch import Tensor

# Blocks from one look at what is captured to the next.
_BLOCKS = 2
# The search ends when a look finds less than this part more than the one before.
_RISE = 2e-4
# The basis is no wider than this part of the side.
_WIDEST = 0.25


def is_iterated(side: int, r: int) -> bool:
    """Return whether `leading` is to be tried before `eigh`; `side` is the matrix's shorter one.

    It is where the basis has room for 12 blocks. For singular values that fall as i^-0.1 or faster
    6 to 10 are enough, for a Gaussian matrix 12 to 18 (r = 4 and 16, sides of 768 to 4096).
    """
    return 12 * _width(r) <= _WIDEST * side


def _width(r: int) -> int:
    """Return the columns of a block: 8 more than asked for, and a multiple of 8, which is quick."""
    return 8 * -(-r // 8) + 8


def leading(M: Tensor, r: int) -> Tensor | None:
    """Return r orthonormal columns that capture as much of M, within 0.1%, as any others.

        U = argmax |U^T M|^2  among  U = Q V,    Q spanning  M X, (M M^T) M X, (M M^T)^2 M X, ...

    X is Gaussian and of a fixed seed, so U depends on M alone. Q grows until U captures no more by
    it; None if that takes a basis so wide that `eigh` of the whole is as quick.

    Source: Musco and Musco 2015, "Randomized Block Krylov Methods for Stronger and Faster
    Approximate Singular Value Decomposition", algorithm 2.
    """
    generator = torch.Generator().manual_seed(0)
    width, noise = _width(r), 100 * torch.finfo(M.dtype).eps

    def gaussian(rows: int) -> Tensor:
        drawn = torch.randn(rows, width, generator=generator, dtype=M.dtype)
        scaled: Tensor = drawn.to(M.device) / rows**0.5
        return scaled

    Q, images, captured = M.new_empty(len(M), 0), [gaussian(M.shape[1])], 0.0
    while Q.shape[1] + _BLOCKS * width <= _WIDEST * len(M):
        for _ in range(_BLOCKS):
            # Where M has no more directions, or none that is new, the noise gives others.
            block = _orthonormal(M @ images[-1]) + noise * gaussian(len(M))
            for _ in range(2):  # once leaves a part of Q in what was small
                block = _orthonormal(block - Q @ (Q.T @ block))
            Q = torch.cat([Q, block], 1)
            images.append(M.T @ block)
        image = torch.cat(images[1:], 1)  # M^T Q
        values, V = torch.linalg.eigh(image.T @ image)
        before, captured = captured, float(values[-r:].sum())
        if captured - before <= _RISE * captured:
            return Q @ V[:, -r:]  # type: ignore[no-any-return]
    return None


def _orthonormal(block: Tensor) -> Tensor:
    Q: Tensor = torch.linalg.qr(block)[0]
    return Q
