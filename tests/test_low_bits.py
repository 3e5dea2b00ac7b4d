"""A float32 number as 16 bits and the next eight: what they say, and how close they come."""

import pytest
import torch
from torch import Tensor

from cases import LAYOUTS, SIXTEEN_BIT_DTYPES, adapt_every_weight
from models import randn, seeded
from references import of_codes, relative_distance
from rosa_func.weight import read
from rosa_func.weight.low_bits import decoded, encoded
from rosa_func.weight.low_rank import low_rank

EVERY_DTYPE = pytest.mark.parametrize("dtype", SIXTEEN_BIT_DTYPES, ids=str)
# Of a value, half a step of the 24 bits: the 16 hold 8 or 11 of it, the codes 8 more.
UNIT = {torch.bfloat16: 2.0**-16, torch.float16: 2.0**-19}


def all_numbers(dtype: torch.dtype) -> Tensor:
    """Return all finite numbers of 16 bits: zeros of both signs, subnormals, the largest."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    return every[every.isfinite()]


def hard_numbers(dtype: torch.dtype) -> Tensor:
    """Return float32 numbers of all sizes that the dtype has: a million, and the odd ones."""
    info = torch.finfo(dtype)
    own = all_numbers(dtype).float()
    between = own * (1 + randn(4, len(own)) * 2.0**-9)
    powers = own[own.abs().frexp().mantissa == 0.5]
    beside = powers * (1 + torch.tensor([-1.0, 1.0])[:, None] * 2.0**-23)
    middle = (own[1:] + own[:-1]) / 2
    return torch.cat([own, between.flatten(), powers, beside.flatten(), middle]).clamp(
        info.min, info.max
    )


@EVERY_DTYPE
class TestCodes:
    def test_a_code_says_how_far_the_next_number_is(self, dtype: torch.dtype):
        R = all_numbers(dtype)
        for code in (0, 1, 77, 127, -1, -77, -128):
            of = R if code >= 0 else R[R != 0]  # nothing lies between zero and zero
            codes = torch.full(of.shape, code, dtype=torch.int8)
            h = decoded(of, codes)
            assert torch.equal(h.double(), of_codes(of, codes))
            assert torch.equal(h.signbit(), of.signbit())
            again = encoded(h, dtype)
            assert torch.equal(again[0].view(torch.int16), of.view(torch.int16))
            assert torch.equal(again[1], codes)

    def test_24_bits_are_within_half_their_step(self, dtype: torch.dtype):
        h = hard_numbers(dtype)
        R, codes = encoded(h, dtype)
        tiny = torch.finfo(dtype).smallest_normal
        bound = UNIT[dtype] * h.double().abs().clamp_min(tiny)
        bound += 2.0**-38 if dtype == torch.float16 else 0  # scaled, it may be a subnormal
        assert ((decoded(R, codes).double() - h.double()).abs() <= bound).all()

    def test_the_16_bits_are_the_nearest_but_close_to_the_middle(self, dtype: torch.dtype):
        h = hard_numbers(dtype)
        R, _ = encoded(h, dtype)
        info = torch.finfo(dtype)
        # The step at h, that of subnormals below the smallest normal number.
        step = 2.0 ** (h.double().abs().clamp_min(info.smallest_normal).log2().floor())
        off = (R.double() - h.double()).abs() / (step * info.eps)
        assert (off <= 0.5 + 1.04 * 2.0**-9).all()  # and what scaling takes of subnormals

    def test_what_is_a_number_of_the_dtype_loses_nothing(self, dtype: torch.dtype):
        R = all_numbers(dtype)
        stored, codes = encoded(R.float(), dtype)
        assert torch.equal(stored.view(torch.int16), R.view(torch.int16))  # -0.0 is -0.0
        assert not codes.any()

    def test_what_is_beyond_the_largest_number_is_seen(self, dtype: torch.dtype):
        """A float16 of more than 2^16 has bits that belong to no exponent."""
        largest = torch.finfo(dtype).max
        beyond = torch.tensor([largest * 1.004, largest * 2, 3.4e38]).clamp(max=3.4028e38)
        for h in (beyond, -beyond):
            assert not encoded(h, dtype)[0].isfinite().any()

    def test_shapes_and_strides(self, dtype: torch.dtype):
        for h in (randn(3, 70_001).T, randn(2, 3, 4), randn(0, 4), torch.ones(())):
            R, codes = encoded(h, dtype)
            assert R.shape == codes.shape == h.shape
            assert relative_distance(decoded(R, codes), h) <= UNIT[dtype] if h.numel() else True


@EVERY_DTYPE
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_split_holds_what_is_left_of_the_weight(layout, dtype: torch.dtype):
    """R alone is off by 2^-9 of a bfloat16 value, and its error in bfloat16 took twice the bytes.

    A rounding is off by its step / sqrt(12) on average: 2^-17.4 of a value with random digits.
    """
    module = seeded(lambda: layout.build(48, 40)).to(dtype)
    state = adapt_every_weight(module, 8)
    w = read(state).adapted()["weight"]
    assert w.lost is not None and w.lost.dtype == torch.int8 and w.lost.shape == w.shape
    A, B = (factor.double() for factor in low_rank(w))
    expected = module.weight.detach().double() - (A @ B).view(w.shape)
    found = decoded(w.base.R, w.lost).double()
    assert (found - expected).norm() <= UNIT[dtype] / 2 * expected.norm()
