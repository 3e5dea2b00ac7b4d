"""The arithmetic of a split: exact where it claims so, within a derived bound elsewhere."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models import randn
from rosa_func.exact import SUPPORTED, compensation_dtype, factor_dtype, join, split, two_sum

SIZES = st.integers(1, 9)
SEEDS = st.integers(0, 2**20)
DTYPES = st.sampled_from(SUPPORTED)
SIXTEEN_BIT = st.sampled_from([torch.float16, torch.bfloat16])


def scattered(m: int, n: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Draw a matrix with magnitudes from 1e-3 to 1e3 side by side, and some zeros."""
    exponents = 6 * torch.rand(m, n, generator=torch.Generator().manual_seed(seed)) - 3
    W = randn(m, n, seed=seed, dtype=torch.float64) * 10 ** exponents.double()
    return torch.where(exponents > -2.9, W, 0).to(dtype)


def factors(m: int, n: int, r: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    return randn(m, r, seed=seed + 1, dtype=dtype), randn(r, n, seed=seed + 2, dtype=dtype)


class TestTwoSum:
    @given(SIZES, SIZES, SEEDS)
    def test_the_error_is_exact(self, m, n, seed):
        a = scattered(m, n, torch.float32, seed)
        b = scattered(m, n, torch.float32, seed + 1)
        s, e = two_sum(a, b)
        assert torch.equal(s, a + b)
        # Float64 holds the sum of two float32 numbers of these magnitudes exactly.
        assert torch.equal(s.double() + e.double(), a.double() + b.double())


class TestExactMerge:
    @given(SIZES, SIZES, st.integers(1, 9), DTYPES, SEEDS)
    def test_join_reverses_split_bit_for_bit(self, m, n, r, dtype, seed):
        W = scattered(m, n, dtype, seed)
        A, B = factors(m, n, r, factor_dtype(dtype), seed)
        R, c = split(W, A, B, dtype, compensation_dtype(dtype, True))
        assert R.dtype == dtype
        assert torch.equal(join(R, A, B, c).to(dtype), W)

    @given(SIXTEEN_BIT, SEEDS)
    def test_values_far_below_the_product_come_back_too(self, dtype, seed):
        # Here a compensation in float32 has no room for the bits of W beside those R lost.
        W = scattered(9, 9, dtype, seed) * (2.0**-30 if dtype == torch.bfloat16 else 2.0**-12)
        A, B = factors(9, 9, 4, torch.float32, seed)
        kept = compensation_dtype(dtype, True)
        R, c = split(W, A, 64 * B, dtype, kept)
        assert torch.equal(join(R, A, 64 * B, c).to(dtype), W)

    @pytest.mark.parametrize("dtype", SUPPORTED)
    def test_a_layout_of_the_factors_does_not_matter(self, dtype):
        W = scattered(40, 33, dtype, 0)
        A, B = factors(40, 33, 7, factor_dtype(dtype), 0)
        R, c = split(W, A, B, dtype, compensation_dtype(dtype, True))
        unaligned = torch.cat([A.new_zeros(1), A.flatten()])[1:].view_as(A)
        transposed = B.t().contiguous().t()
        assert torch.equal(join(R, unaligned, transposed, c).to(dtype), W)

    @pytest.mark.parametrize(
        ("dtype", "exact", "expected"),
        [
            (torch.bfloat16, None, torch.bfloat16),
            (torch.float16, None, torch.float16),
            (torch.float32, None, None),
            (torch.float64, None, None),
            (torch.bfloat16, True, torch.float64),
            (torch.float32, True, torch.float32),
            (torch.float64, True, torch.float64),
            (torch.bfloat16, False, None),
        ],
    )
    def test_what_is_kept(self, dtype, exact, expected):
        assert compensation_dtype(dtype, exact) == expected


class TestRoundingBounds:
    @given(SIZES, SIZES, st.integers(1, 9), st.sampled_from([torch.float32, torch.float64]), SEEDS)
    def test_without_compensation(self, m, n, r, dtype, seed):
        W = scattered(m, n, dtype, seed)
        A, B = factors(m, n, r, dtype, seed)
        R, _ = split(W, A, B, dtype, None)
        assert ((join(R, A, B, None) - W).abs() <= fused_bound(W, R, A, B)).all()

    @given(SIZES, SIZES, st.integers(1, 9), SIXTEEN_BIT, st.booleans(), SEEDS)
    def test_in_16_bit(self, m, n, r, dtype, kept, seed):
        W = scattered(m, n, dtype, seed)
        A, B = factors(m, n, r, torch.float32, seed)
        R, c = split(W, A, B, dtype, dtype if kept else None)
        off = (join(R, A, B, c).to(dtype) - W).abs()
        assert (off <= sixteen_bit_bound(W, R, A, B, kept)).all()


class TestStorage:
    @pytest.mark.parametrize("dtype", SUPPORTED)
    @pytest.mark.parametrize("exact", [True, None, False])
    def test_a_zero_product_shares_the_weight(self, dtype, exact):
        W = scattered(5, 4, dtype, 0)
        A, B = factors(5, 4, 2, factor_dtype(dtype), 0)
        R, c = split(W, torch.zeros_like(A), B, dtype, compensation_dtype(dtype, exact))
        assert R.data_ptr() == W.data_ptr()
        assert c is None or not c.any()

    @pytest.mark.parametrize("dtype", SUPPORTED)
    @pytest.mark.parametrize("exact", [True, None, False])
    def test_a_weight_of_ones_own_gives_the_same_bits(self, dtype, exact):
        kept = compensation_dtype(dtype, exact)
        A, B = factors(40, 33, 7, factor_dtype(dtype), 0)
        W = scattered(40, 33, dtype, 0)
        copy = W.clone()
        R, c = split(W, A, B, dtype, kept)
        assert torch.equal(W, copy)
        own_R, own_c = split(copy, A, B, dtype, kept, own=True)
        assert torch.equal(own_R, R) and (c is None or torch.equal(own_c, c))
        if kept is None and dtype == A.dtype:
            assert own_R.data_ptr() == copy.data_ptr()


def fused_bound(W: Tensor, R: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Bound |join(split(W)) - W| where both are sums of r + 1 terms in any order.

    Each is off by g = (r+1) u / (1 - (r+1) u) times the sum of its terms' magnitudes (Higham,
    "Accuracy and Stability", 3.1): |W| + |A||B| for the split, |R| + |A||B| for the join.
    """
    terms = (A.shape[1] + 1) * torch.finfo(W.dtype).eps / 2
    return terms / (1 - terms) * (W.abs() + R.abs() + 2 * (A.abs() @ B.abs())) * (1 + 1e-6)


def sixteen_bit_bound(W: Tensor, R: Tensor, A: Tensor, B: Tensor, kept: bool) -> Tensor:
    """Bound |merge - W| for 16-bit weights whose lost bits are kept in the same dtype, or not.

    R, or the compensation that holds what R lost, is off by half a unit in its last place; the
    float32 sums of at most 9 + 1 terms by a few of theirs.
    """
    u, u32 = torch.finfo(W.dtype).eps / 2, 2**-24
    lost = u * u if kept else u
    size = R.abs().double() + W.abs().double() + (A.double().abs() @ B.double().abs())
    tiny = torch.finfo(W.dtype).smallest_normal * u  # half a subnormal step
    off = 1.01 * lost * size + 8 * u32 * size + 2 * tiny
    # W is a number of its dtype, so rounding to the nearest moves by `off` once more at most.
    return 2 * off
