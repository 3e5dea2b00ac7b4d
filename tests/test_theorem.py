"""Hameed and Rabusseau 2024, theorem 1, on linear regression with each cycle solved exactly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn

import rosa_func
from cases import SEEDS
from models import randn
from rosa_func import samplers

M, N = 16, 24
RANKS = st.integers(1, 14)  # of the change that is to be found


def regression_problem(rank: int, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a layer, the inputs, and the weight that is to be found, `rank` away from the layer's.

    The change has singular values between 1 and 2, so that no part of it is too small to be seen.
    """
    double = torch.float64
    module = nn.Linear(N, M, bias=False).double()
    module.load_state_dict({"weight": randn(M, N, seed=seed, dtype=double)})
    U = torch.linalg.qr(randn(M, rank, seed=seed + 1, dtype=double))[0]
    V = torch.linalg.qr(randn(N, rank, seed=seed + 2, dtype=double))[0]
    x = randn(100, N, seed=seed + 3, dtype=double)
    change = U * torch.linspace(2, 1, rank, dtype=double) @ V.T
    return module, x, module.weight.detach() + change


def svd_of_what_is_left(
    residual: Tensor, x: Tensor, optimum: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the SVD of what is left to find, in the metric of the loss, and its square root."""
    L = torch.linalg.cholesky(x.T @ x)
    return *torch.linalg.svd((optimum - residual) @ L), L


def solve_cycle(state: TensorDict, r: int, x: Tensor, optimum: Tensor) -> None:
    """Set A B to the least-squares solution of rank r (Eckart and Young 1936)."""
    U, S, Vh, L = svd_of_what_is_left(state["frozen", "weight"], x, optimum)
    factors = state["trainable", "weight"]
    factors["A"].copy_(U[:, :r] * S[:r])
    factors["B"].copy_(torch.linalg.solve_triangular(L, Vh[:r], upper=False, left=False))


def regression_loss(state: TensorDict, x: Tensor, optimum: Tensor) -> float:
    return float((x @ (rosa_func.merge(state)["weight"] - optimum).T).norm())


@given(RANKS, st.integers(1, 6), SEEDS)
def test_additive_reaches_the_optimum_in_rank_over_r_cycles(rank, r, seed):
    module, x, optimum = regression_problem(rank, seed)
    _, spectrum, _, _ = svd_of_what_is_left(module.weight.detach(), x, optimum)
    state = rosa_func.init(module, r, sampler=samplers.additive)
    scale, cycles = regression_loss(state, x, optimum), -(-rank // r)
    for cycle in range(1, cycles + 1):
        solve_cycle(state, r, x, optimum)
        # Each cycle takes the r largest that are left.
        floor = spectrum[cycle * r :].norm().item()
        assert regression_loss(state, x, optimum) == pytest.approx(floor, abs=1e-10 * scale)
        assert (floor <= 1e-10 * scale) == (cycle == cycles)
        state = rosa_func.resample(state, cycle, sampler=samplers.additive)


@given(RANKS, st.integers(1, 6), SEEDS)
def test_one_cycle_of_lora_stays_at_its_floor(rank, r, seed):
    module, x, optimum = regression_problem(rank, seed)
    _, spectrum, _, _ = svd_of_what_is_left(module.weight.detach(), x, optimum)
    state = rosa_func.init(module, r, sampler=samplers.lora)
    scale = regression_loss(state, x, optimum)
    solve_cycle(state, r, x, optimum)
    floor = spectrum[r:].norm().item()
    assert regression_loss(state, x, optimum) == pytest.approx(floor, rel=1e-10, abs=1e-12 * scale)
    assert (floor > 1e-3 * scale) == (r < rank)
