"""Samplers: how the factors of a weight are drawn.

A sampler is `sampler(W, r, site) -> (A, B)`, with W (m x n, float32 or float64), A (m x r) and
B (r x n). Nothing else tells one method from another: the residual is always W - A B. To write a
sampler of your own, take every random number from `site.generator`, leave W as it is and keep
nothing of it: a resample takes its memory for R. The factors may be views of W; they are copied.
Of a batch of matrices it is asked for each of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rosa_func.weight.leading import is_iterated, leading


class Site(NamedTuple):
    """What a sampler may know of the weight beside its values.

    Attributes:
        name: the weight's dotted name.
        input_dim: the dimension of W that meets the layer's input: 1 for `nn.Linear` (out x in),
            0 for `Conv1D` (in x out). An embedding counts as the transposed linear layer to which
            it is often tied, so 1.
        generator: the source of randomness, on the CPU.

    Example:
        >>> import torch
        >>> from rosa_func import samplers
        >>> site = samplers.Site("weight", 1, torch.Generator().manual_seed(0))
    """

    name: str
    input_dim: int
    generator: torch.Generator


Sampler = Callable[[Tensor, int, Site], tuple[Tensor, Tensor]]


def check_sampler(sampler: Sampler) -> None:
    """Refuse what is no function like `random`, such as a sampler's name."""
    if not callable(sampler):
        raise TypeError(f"a sampler is a function such as samplers.random, got {sampler!r}")


def random(W: Tensor, r: int, site: Site) -> tuple[Tensor, Tensor]:
    """ROSA: r singular directions of W, every subset equally likely.

        W = sum_i s_i u_i v_i^T,    A B = sum_{i in I} s_i u_i v_i^T,    I a random r-subset

    The singular values are shared equally: column i of A and row i of B both have norm sqrt(s_i).
    (Measured: all on the input side made no difference, all on the output side was not better;
    examples/experiments/RESULTS.md, `factors`.)
    Directions come from `eigh` of the smaller Gram matrix in W's dtype. Within it, directions
    whose singular values are closer than about eps * s_max**2 / s_i mix: the subspace is then
    random in another basis, while the law W = R + A B is untouched.

    Source: Hameed and Rabusseau 2023, "ROSA: Random Orthogonal Subspace Adaptation", section 3.

    Example:
        >>> import torch
        >>> from rosa_func import samplers
        >>> W = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        >>> site = samplers.Site("weight", 1, torch.Generator().manual_seed(0))
        >>> A, B = samplers.random(W, 2, site)
        >>> A.shape, B.shape
        (torch.Size([6, 2]), torch.Size([2, 4]))
    """
    chosen = torch.randperm(min(W.shape), generator=site.generator)[:r].sort().values
    return _singular_directions(W, chosen, W.dtype)


def top(W: Tensor, r: int, site: Site) -> tuple[Tensor, Tensor]:
    """PiSSA: the r largest singular directions of W; nothing is random.

        A B = sum_{i <= r} s_i u_i v_i^T

    Of a W far wider than r they come from block Krylov iteration, which is quicker than `eigh` (at
    4096 x 4096 and r = 16, 13 times for a Gaussian W, and up to 30 times where the singular values
    fall): |A B|^2 is then within 0.1% of the largest there is. It begins with directions of a fixed
    seed, so the factors depend on W alone, not on the key.

    Source: Meng et al. 2024, "PiSSA", equations 2-4.

    Example:
        >>> import torch
        >>> from rosa_func import samplers
        >>> W = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> A, B = samplers.top(W, 1, samplers.Site("weight", 1, torch.Generator()))
        >>> torch.allclose(A @ B, torch.diag(torch.tensor([3.0, 0.0, 0.0])), atol=1e-6)
        True
    """
    k = min(W.shape)
    U = leading(_wide(W), r) if is_iterated(k, r) else None
    if U is None:
        return _singular_directions(W, torch.arange(k - r, k), W.dtype)
    return _along(U, W)


def bottom(W: Tensor, r: int, site: Site) -> tuple[Tensor, Tensor]:
    """MiLoRA: the r smallest singular directions of W; nothing is random.

        A B = sum_{i > min(m, n) - r} s_i u_i v_i^T

    The Gram matrix squares the condition number, so this one is decomposed in float64.

    Source: Wang et al. 2024, "MiLoRA", section 3.

    Example:
        >>> import torch
        >>> from rosa_func import samplers
        >>> W = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> A, B = samplers.bottom(W, 1, samplers.Site("weight", 1, torch.Generator()))
        >>> torch.allclose(A @ B, torch.diag(torch.tensor([0.0, 0.0, 1.0])), atol=1e-6)
        True
    """
    return _singular_directions(W, torch.arange(r), torch.float64)


def projection(W: Tensor, r: int, site: Site) -> tuple[Tensor, Tensor]:
    """ROSA without a decomposition: W projected on a random subspace of its shorter side.

        A B = Q Q^T W (m <= n)  or  W Q Q^T (m > n),    Q^T Q = I, uniformly distributed

    Q is the QR factor of a Gaussian matrix; the norm of each term is shared equally. On text it was
    measured to be as good as `random` or better, and a draw takes a fraction of the time; in
    regression from rank 8 on it needs more cycles (examples/experiments/RESULTS.md,
    `e2e-samplers` and `theorem`).

    Source: Hameed and Rabusseau 2023, section 3 (QR in place of the SVD).

    Example:
        >>> import torch
        >>> from rosa_func import samplers
        >>> W = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        >>> site = samplers.Site("weight", 1, torch.Generator().manual_seed(0))
        >>> A, B = samplers.projection(W, 4, site)  # at full rank, all of W
        >>> torch.allclose(A @ B, W, atol=1e-5)
        True
    """
    return _along(_orthonormal(min(W.shape), r, W, site), W)


def lora(W: Tensor, r: int, site: Site) -> tuple[Tensor, Tensor]:
    """LoRA: the input side random, the output side zero, so A B = 0 and R = W bit for bit.

        for W out x in:  A = 0,  B ~ U(-1/sqrt(in), 1/sqrt(in));   for W in x out the other way

    The scale alpha/r of the paper is 1: it lives inside the factors (or in their learning rates).

    Source: Hu et al. 2021, "LoRA", section 4.1; the distribution is that of `peft`'s default.

    Example:
        >>> import torch
        >>> from rosa_func import samplers
        >>> A, B = samplers.lora(torch.ones(6, 4), 2, samplers.Site("w", 1, torch.Generator()))
        >>> bool(A.any()), bool(B.any())
        (False, True)
    """
    fan_in = W.shape[site.input_dim]
    U = torch.rand(fan_in, r, generator=site.generator, dtype=W.dtype).to(W.device)
    return _additive((2 * U - 1) / fan_in**0.5, W, site)


def additive(W: Tensor, r: int, site: Site) -> tuple[Tensor, Tensor]:
    """Additive resampling: the input side random and orthonormal, the output side zero.

        for W out x in:  A = 0,  B B^T = I;    for W in x out:  A^T A = I,  B = 0

    The function does not change at a draw, nor does R. For this kind of draw the theorem holds
    that a linear regression reaches its optimum in ceil(rank(dW)/r) cycles.

    Source: Hameed and Rabusseau 2024, arXiv 2407.07802, theorem 1.

    Example:
        >>> import torch
        >>> from rosa_func import samplers
        >>> A, B = samplers.additive(torch.ones(6, 4), 2, samplers.Site("w", 1, torch.Generator()))
        >>> bool(A.any()), torch.allclose(B @ B.T, torch.eye(2), atol=1e-6)
        (False, True)
    """
    return _additive(_orthonormal(W.shape[site.input_dim], r, W, site), W, site)


def _additive(Q: Tensor, W: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """Put Q (in x r) on the input side and zeros on the other."""
    zeros = W.new_zeros(W.shape[1 - site.input_dim], Q.shape[1])
    return (zeros, Q.T) if site.input_dim == 1 else (Q, zeros.T)


def _orthonormal(rows: int, r: int, like: Tensor, site: Site) -> Tensor:
    """Draw rows x r orthonormal columns on the CPU, for the same draw on every device."""
    gaussian = torch.randn(rows, r, generator=site.generator, dtype=like.dtype)
    Q: Tensor = torch.linalg.qr(gaussian)[0]
    return Q.to(like.device)


def _singular_directions(W: Tensor, ascending: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the singular terms of W of the given places, counted from the smallest."""
    U = torch.linalg.eigh(_gram(_wide(W).to(dtype)))[1][:, ascending.to(W.device)]
    return _along(U.to(W.dtype), W)


def _wide(W: Tensor) -> Tensor:
    """Return W, or its transpose if it has more rows than columns."""
    return W if W.shape[0] <= W.shape[1] else W.T


def _along(U: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """Return the part of W along orthonormal columns, which are directions of its shorter side."""
    wide = _wide(W)
    A, B = _balanced(U, U.T @ wide)
    return (A, B) if wide is W else (B.T, A.T)


def _gram(M: Tensor, rows: int = 128) -> Tensor:
    """Return the lower triangle of M M^T, which is all that `eigh` reads, some rows at a time.

    Entries above the diagonal blocks stay zero: of 768 rows that saves 42% of the products.
    """
    G = M.new_zeros(M.shape[0], M.shape[0])
    for start in range(0, M.shape[0], rows):
        end = start + rows
        G[start:end, :end] = M[start:end] @ M[:end].T
    return G


def _balanced(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Share the norms of V's rows between U's unit columns and V.

    A term of norm zero shares nothing: with both of its factors zero it could never train.
    """
    share = torch.linalg.vector_norm(V, dim=1).sqrt()
    share = torch.where(share > 0, share, 1)
    return U * share, V / share[:, None]
