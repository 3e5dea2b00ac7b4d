"""The arithmetic of a split: exact where it claims to be, within a derived bound elsewhere."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bounds import merge_bound, rounding_bound, rounding_bound_in_16_bit
from cases import ANY_16_BIT_DTYPE, ANY_DTYPE, ANY_WIDE_DTYPE, DTYPES, SEEDS, scattered_matrix
from models import randn
from rosa_func.weight import Weight, rounding
from rosa_func.weight.dense import Dense
from rosa_func.weight.keeping import Kept
from rosa_func.weight.low_rank import LowRank
from rosa_func.weight.rounding import compensation_dtype, factor_dtype, two_sum
from toys import Int8

SIDES = st.integers(1, 9)
RANKS = st.integers(1, 9)  # of any size: the arithmetic needs no r <= min(m, n)


def random_factors(m: int, n: int, r: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    return randn(m, r, seed=seed + 1, dtype=dtype), randn(r, n, seed=seed + 2, dtype=dtype)


def split(
    W: Tensor,
    A: Tensor,
    B: Tensor,
    dtype: torch.dtype,
    kept: torch.dtype | None,
    own: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return R and what rounding took, of a dense base."""
    like = Dense(torch.empty(0, dtype=dtype))
    base, lost = rounding.split(W, LowRank(A, B), like, kept and Kept(kept), own)
    return base.R, lost


def weight_and_factors(
    m: int, n: int, r: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, LowRank]:
    factors = random_factors(m, n, r, factor_dtype(dtype), seed)
    return scattered_matrix(m, n, dtype, seed), LowRank(*factors)


def join(R: Tensor, A: Tensor, B: Tensor, lost: Tensor | None) -> Tensor:
    return rounding.join(Weight(Dense(R), (LowRank(A, B),), torch.tensor(1), lost))


class TestTwoSum:
    @given(SIDES, SIDES, SEEDS)
    def test_two_sum_gives_the_exact_error(self, m, n, seed):
        a = scattered_matrix(m, n, torch.float32, seed)
        b = scattered_matrix(m, n, torch.float32, seed + 1)
        s, e = two_sum(a, b)
        assert torch.equal(s, a + b)
        # Float64 holds the sum of two float32 numbers of these magnitudes exactly.
        assert torch.equal(s.double() + e.double(), a.double() + b.double())


class TestExactMerge:
    @given(SIDES, SIDES, RANKS, ANY_DTYPE, SEEDS)
    def test_join_reverses_split_bit_for_bit(self, m, n, r, dtype, seed):
        W = scattered_matrix(m, n, dtype, seed)
        A, B = random_factors(m, n, r, factor_dtype(dtype), seed)
        R, c = split(W, A, B, dtype, compensation_dtype(dtype, True))
        assert R.dtype == dtype
        assert torch.equal(join(R, A, B, c).to(dtype), W)

    @given(ANY_16_BIT_DTYPE, SEEDS)
    def test_join_gives_back_values_far_below_the_product(self, dtype, seed):
        # A compensation in float32 would have no room for the bits of W beside those that R lost.
        W = scattered_matrix(9, 9, dtype, seed) * (
            2.0**-30 if dtype == torch.bfloat16 else 2.0**-12
        )
        A, B = random_factors(9, 9, 4, torch.float32, seed)
        kept = compensation_dtype(dtype, True)
        R, c = split(W, A, 64 * B, dtype, kept)
        assert torch.equal(join(R, A, 64 * B, c).to(dtype), W)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_join_does_not_depend_on_the_strides_of_the_factors(self, dtype):
        W = scattered_matrix(40, 33, dtype, 0)
        A, B = random_factors(40, 33, 7, factor_dtype(dtype), 0)
        R, c = split(W, A, B, dtype, compensation_dtype(dtype, True))
        unaligned = torch.cat([A.new_zeros(1), A.flatten()])[1:].view_as(A)
        transposed = B.t().contiguous().t()
        assert torch.equal(join(R, unaligned, transposed, c).to(dtype), W)

    @pytest.mark.parametrize(
        ("dtype", "exact", "expected"),
        [
            (torch.bfloat16, None, torch.int8),
            (torch.float16, None, torch.int8),
            (torch.float32, None, None),
            (torch.float64, None, None),
            (torch.bfloat16, True, torch.float64),
            (torch.float32, True, torch.float32),
            (torch.float64, True, torch.float64),
            (torch.bfloat16, False, None),
        ],
    )
    def test_the_dtype_of_the_compensation(self, dtype, exact, expected):
        assert compensation_dtype(dtype, exact) == expected


class TestRoundingBounds:
    @given(SIDES, SIDES, RANKS, ANY_WIDE_DTYPE, SEEDS)
    def test_join_without_compensation_is_within_the_rounding_bound(self, m, n, r, dtype, seed):
        W = scattered_matrix(m, n, dtype, seed)
        A, B = random_factors(m, n, r, dtype, seed)
        R, _ = split(W, A, B, dtype, None)
        assert ((join(R, A, B, None) - W).abs() <= rounding_bound(W, R, A, B)).all()

    @given(SIDES, SIDES, RANKS, ANY_16_BIT_DTYPE, st.sampled_from(["not", "in 16", "in 8"]), SEEDS)
    def test_join_in_16_bit_is_within_the_rounding_bound(self, m, n, r, dtype, how, seed):
        W = scattered_matrix(m, n, dtype, seed)
        A, B = random_factors(m, n, r, torch.float32, seed)
        kept = {"not": None, "in 16": dtype, "in 8": torch.int8}[how]
        R, c = split(W, A, B, dtype, kept)
        off = (join(R, A, B, c).to(dtype) - W).abs()
        assert (off <= rounding_bound_in_16_bit(W, R, A, B, kept)).all()


class TestBaseThatTakesManyBits:
    """What an int8 base takes is kept like what rounding takes, in float64 if all of it is."""

    @given(SIDES, SIDES, RANKS, ANY_DTYPE.filter(lambda dtype: dtype != torch.float64), SEEDS)
    def test_join_reverses_split_with_a_float64_compensation(self, m, n, r, dtype, seed):
        W, factors = weight_and_factors(m, n, r, dtype, seed)
        base, lost = rounding.split(W, factors, Int8.like(W), Kept(torch.float64))
        joined = rounding.join(Weight(base, (factors,), torch.tensor(1), lost))
        assert torch.equal(joined.to(dtype), W)

    @given(SIDES, SIDES, RANKS, ANY_DTYPE, st.booleans(), SEEDS)
    def test_join_is_within_the_bound_with_a_compensation_of_the_weights_dtype_or_none(
        self, m, n, r, dtype, is_kept, seed
    ):
        W, factors = weight_and_factors(m, n, r, dtype, seed)
        base, lost = rounding.split(W, factors, Int8.like(W), Kept(dtype) if is_kept else None)
        w = Weight(base, (factors,), torch.tensor(1), lost)
        assert ((rounding.join(w).to(dtype) - W).abs() <= merge_bound(W, w)).all()


class TestStorage:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("exact", [True, None, False])
    def test_split_of_a_zero_product_shares_the_weights_storage(self, dtype, exact):
        W = scattered_matrix(5, 4, dtype, 0)
        A, B = random_factors(5, 4, 2, factor_dtype(dtype), 0)
        R, c = split(W, torch.zeros_like(A), B, dtype, compensation_dtype(dtype, exact))
        assert R.data_ptr() == W.data_ptr()
        assert c is None or not c.numel()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("exact", [True, None, False])
    def test_split_that_may_overwrite_the_weight_gives_the_same_bits(self, dtype, exact):
        kept = compensation_dtype(dtype, exact)
        A, B = random_factors(40, 33, 7, factor_dtype(dtype), 0)
        W = scattered_matrix(40, 33, dtype, 0)
        copy = W.clone()
        R, c = split(W, A, B, dtype, kept)
        assert torch.equal(W, copy)
        own_R, own_c = split(copy, A, B, dtype, kept, own=True)
        assert torch.equal(own_R, R) and (c is None or torch.equal(own_c, c))
        if kept is None and dtype == A.dtype:
            assert own_R.data_ptr() == copy.data_ptr()
