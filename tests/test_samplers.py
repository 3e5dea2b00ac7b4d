"""What each sampler draws, against torch.linalg.svd as the independent reference."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rosa_func
from cases import SAMPLERS, SEEDS, ZERO_PRODUCT_SAMPLERS
from references import storage_pointers
from rosa_func import samplers
from rosa_func.samplers import Site
from rosa_func.weight.leading import leading

SIDES = st.integers(2, 12)


def site(seed: int, input_dim: int = 1) -> Site:
    return Site("weight", input_dim, torch.Generator().manual_seed(seed))


def matrix_of_known_spectrum(m: int, n: int, seed: int) -> torch.Tensor:
    """Return a float64 matrix with singular values 1, 2, ... so that its directions are certain."""
    draw = torch.Generator().manual_seed(seed)
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, generator=draw, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(n, k, generator=draw, dtype=torch.float64))[0]
    return U * torch.arange(1, k + 1, dtype=torch.float64) @ V.T


def terms_of_the_svd(W: torch.Tensor, product: torch.Tensor) -> list[int]:
    """Return the places (0 the largest) of the singular terms of which the product is the sum."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    kept = (U.T @ product @ Vh.T).diagonal() / S
    chosen = [i for i, share in enumerate(kept.tolist()) if share > 0.5]
    rebuilt = U[:, chosen] * S[chosen] @ Vh[chosen]
    assert torch.allclose(product, rebuilt, rtol=0, atol=1e-11 * S[0].item())
    return chosen


class TestSingularDirections:
    @given(SIDES, SIDES, st.data(), SEEDS)
    def test_random_is_exactly_r_terms_of_the_svd(self, m, n, data, seed):
        r = data.draw(st.integers(1, min(m, n)))
        W = matrix_of_known_spectrum(m, n, seed)
        A, B = samplers.random(W, r, site(seed))
        assert len(terms_of_the_svd(W, A @ B)) == r

    @given(SIDES, SIDES, st.data(), SEEDS)
    def test_the_residual_and_the_product_of_random_are_orthogonal(self, m, n, data, seed):
        r = data.draw(st.integers(1, min(m, n)))
        W = matrix_of_known_spectrum(m, n, seed)
        A, B = samplers.random(W, r, site(seed))
        P = A @ B
        bound = 1e-13 * W.norm() ** 2
        assert (P.T @ (W - P)).norm() <= bound
        assert (P @ (W - P).T).norm() <= bound

    @given(SIDES, SIDES, st.data(), SEEDS)
    def test_top_and_bottom_take_the_largest_and_the_smallest_terms(self, m, n, data, seed):
        k = min(m, n)
        r = data.draw(st.integers(1, k))
        W = matrix_of_known_spectrum(m, n, seed)
        for sampler, expected in (
            (samplers.top, list(range(r))),
            (samplers.bottom, list(range(k - r, k))),
        ):
            A, B = sampler(W, r, site(seed))
            assert terms_of_the_svd(W, A @ B) == expected

    def test_bottom_is_right_in_float32_where_a_float32_gram_matrix_is_not(self):
        W = matrix_of_known_spectrum(24, 40, 0)
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        S = torch.logspace(0, -4, 24, dtype=torch.float64)
        W, expected = U * S @ Vh, U[:, -4:] * S[-4:] @ Vh[-4:]

        def error(dtype: torch.dtype) -> float:
            A, B = samplers._singular_directions(W.float(), torch.arange(4), dtype)
            return ((A @ B).double() - expected).norm().item()

        # W moves by u |W| when it becomes float32; the last four directions then turn towards the
        # fifth by that over the gap (Wedin), and take as much of its singular value with them.
        turn = S[-5] / (S[-5] - S[-4])
        bound = 4 * 2**-24 * W.norm().item() * (1 + turn.item())
        assert torch.equal(
            samplers.bottom(W.float(), 4, site(0))[0],
            samplers._singular_directions(W.float(), torch.arange(4), torch.float64)[0],
        )
        assert error(torch.float64) <= bound < error(torch.float32)

    def test_random_draws_every_index_equally_often(self):
        n, k, draws = 32, 4, 10_000
        W = torch.diag(torch.arange(1.0, n + 1))
        generator = torch.Generator().manual_seed(0)
        counts = torch.zeros(n)
        for _ in range(draws):
            A, _ = samplers.random(W, k, Site("weight", 1, generator))
            counts[A.abs().argmax(0)] += 1
        share = k / n
        sigma = math.sqrt(draws * share * (1 - share))
        assert counts.sum() == draws * k
        assert ((counts - draws * share).abs() <= 4 * sigma).all(), counts

    @given(SIDES, SIDES, st.data(), SEEDS)
    def test_singular_values_are_shared_equally(self, m, n, data, seed):
        r = data.draw(st.integers(1, min(m, n)))
        A, B = samplers.top(matrix_of_known_spectrum(m, n, seed), r, site(seed))
        assert torch.allclose(A.norm(dim=0), B.norm(dim=1), rtol=1e-12)

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_zero_singular_values_give_finite_factors_that_can_train(self, sampler):
        A, B = sampler(torch.zeros(5, 4), 3, site(0))
        assert A.isfinite().all() and B.isfinite().all()
        assert not (A @ B).any()
        for i in range(3):
            assert A[:, i].any() or B[i].any(), "a term with both factors zero has no gradient"


class TestGram:
    @given(SIDES, SIDES, st.integers(1, 12), SEEDS)
    def test_gram_is_the_lower_triangle_whatever_the_block(self, m, n, rows, seed):
        W = matrix_of_known_spectrum(m, n, seed)
        # Products of n terms, added in any order (Higham 2002, equation 3.5).
        bound = 2 * n * 2**-53 * (W.abs() @ W.abs().T)
        assert ((samplers._gram(W, rows) - W @ W.T).tril().abs() <= bound).all()

    @pytest.mark.parametrize("shape", [(130, 140), (140, 130)])
    def test_eigh_reads_only_the_lower_triangle_of_gram(self, shape):
        W = matrix_of_known_spectrum(*shape, 0)  # of two blocks
        for sampler, first in ((samplers.top, 0), (samplers.bottom, 127)):
            A, B = sampler(W, 3, site(0))
            assert terms_of_the_svd(W, A @ B) == [first, first + 1, first + 2]


SIDE = 768  # of which the leading directions are found for r <= 8 without `eigh`
LAST = torch.arange(1.0, SIDE + 1, dtype=torch.float64)
SPECTRA = {
    "falling": LAST**-0.5,
    "falling slowly": LAST**-0.1,
    "linear": 1 - (LAST - 1) / SIDE,
    "one value": torch.ones(SIDE, dtype=torch.float64),
    "rank one": (LAST == 1).double(),
    "zero": torch.zeros(SIDE, dtype=torch.float64),
    "one large": torch.where(LAST == 1, 1e6, LAST**-0.1),
}


@pytest.fixture(scope="module")
def wide() -> dict[str, torch.Tensor]:
    """Return float64 matrices with each of the spectra, and a Gaussian one.

    Of the linear spectrum, the hardest, twelve blocks are not enough: `eigh` finds those.
    """
    draw = torch.Generator().manual_seed(0)
    U, V = (
        torch.linalg.qr(torch.randn(side, SIDE, generator=draw, dtype=torch.float64))[0]
        for side in (SIDE, SIDE + 20)
    )
    gaussian = torch.randn(SIDE, SIDE + 20, generator=draw, dtype=torch.float64)
    return {"Gaussian": gaussian} | {name: U * S @ V.T for name, S in SPECTRA.items()}


class TestLeadingDirections:
    """`top` of a matrix far wider than r, where `eigh` takes ten times as long."""

    @pytest.mark.parametrize("name", ["Gaussian", *SPECTRA])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_top_captures_as_much_as_the_largest_singular_values(self, wide, name, dtype):
        W = wide[name]
        largest = torch.linalg.eigvalsh(W @ W.T)[-3:].sum()
        for M in (W.to(dtype), W.to(dtype).T):
            A, B = (factor.double() for factor in samplers.top(M, 3, site(0)))
            assert (A @ B).square().sum() >= 0.999 * largest

    @pytest.mark.parametrize("name", ["Gaussian", *(name for name in SPECTRA if name != "linear")])
    def test_orthonormal_directions_are_found_without_eigh(self, wide, name):
        """Where nothing new is found, rounding errors stood in for directions: 6 off."""
        U = leading(wide[name].float(), 3)
        assert U is not None
        # Sums of SIDE products of entries with errors of that order themselves.
        assert (U.T @ U - torch.eye(3)).abs().max() <= 10 * SIDE**0.5 * 2**-23

    def test_top_is_the_svds_where_there_is_a_gap(self):
        S = torch.where(LAST <= 2, 3 - LAST, 0.01)
        draw = torch.Generator().manual_seed(1)
        U, V = (
            torch.linalg.qr(torch.randn(SIDE, SIDE, generator=draw, dtype=torch.float64))[0]
            for _ in range(2)
        )
        A, B = samplers.top(U * S @ V.T, 2, site(0))
        # Four blocks at least: W, and three times W W^T. In each product the rest shrinks by the
        # gap, and at first it is at most SIDE times as large (Halko et al. 2011, section 9.3).
        bound = SIDE * 0.01**7 + 1e4 * 2**-53
        assert (A @ B - U[:, :2] * S[:2] @ V[:, :2].T).norm() <= bound

    def test_top_depends_on_the_weight_alone(self, wide):
        W, state = wide["Gaussian"], torch.get_rng_state()
        draws = [samplers.top(W.clone(), 2, site(seed)) for seed in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize(("side", "r"), [(767, 8), (768, 9), (768, 768)])
    def test_eigh_decomposes_what_is_not_so_wide(self, wide, side, r):
        W = wide["Gaussian"][:side].float()
        expected = samplers._singular_directions(W, torch.arange(side - r, side), W.dtype)
        assert all(map(torch.equal, samplers.top(W, r, site(0)), expected))

    def test_eigh_decomposes_what_is_not_found_in_time(self, wide, monkeypatch):
        W = wide["Gaussian"].float()
        monkeypatch.setattr(samplers, "leading", lambda M, r: None)
        expected = samplers._singular_directions(W, torch.arange(SIDE - 2, SIDE), W.dtype)
        assert all(map(torch.equal, samplers.top(W, 2, site(0)), expected))


class TestProjection:
    @given(SIDES, SIDES, st.data(), SEEDS)
    def test_projection_is_an_orthogonal_projection_of_rank_r(self, m, n, data, seed):
        r = data.draw(st.integers(1, min(m, n)))
        W = matrix_of_known_spectrum(m, n, seed)
        A, B = samplers.projection(W, r, site(seed))
        P = A @ B
        assert torch.linalg.matrix_rank(P) == r
        inner = P.T @ (W - P) if m <= n else P @ (W - P).T
        assert inner.norm() <= 1e-13 * W.norm() ** 2


class TestZeroProducts:
    @given(SIDES, SIDES, st.sampled_from([0, 1]), st.data(), SEEDS)
    def test_a_zero_product_has_a_random_input_side_and_a_zero_output_side(
        self, m, n, dim, data, seed
    ):
        r = data.draw(st.integers(1, min(m, n)))
        W = matrix_of_known_spectrum(m, n, seed)
        for sampler in ZERO_PRODUCT_SAMPLERS:
            factors = sampler(W, r, site(seed, dim))
            # A (m x r) faces dimension 0 of W, B (r x n) dimension 1.
            assert factors[dim].any() and not factors[1 - dim].any()
            assert (factors[0].shape, factors[1].shape) == ((m, r), (r, n))

    @given(SIDES, st.data(), SEEDS)
    def test_additive_is_orthonormal(self, n, data, seed):
        r = data.draw(st.integers(1, n))
        _, B = samplers.additive(matrix_of_known_spectrum(n, n, seed), r, site(seed))
        assert torch.allclose(B @ B.T, torch.eye(r, dtype=B.dtype), atol=1e-13)

    def test_lora_is_uniform_within_one_over_the_root_of_the_fan_in(self):
        _, B = samplers.lora(torch.zeros(4, 10_000), 4, site(0))
        assert B.abs().max() <= 0.01
        assert abs(B.std().item() - 0.01 / math.sqrt(3)) <= 1e-4


def first_rows_sampler(W, r, site):
    return torch.eye(W.shape[0], dtype=W.dtype)[:, :r], W[:r]


class TestAllSamplers:
    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_samplers_touch_neither_the_weight_nor_the_global_generator(self, sampler):
        W = matrix_of_known_spectrum(6, 5, 0)
        copy, before = W.clone(), torch.get_rng_state()
        sampler(W, 2, site(0))
        assert torch.equal(W, copy)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_a_site_determines_the_draw(self, sampler):
        draws = [sampler(matrix_of_known_spectrum(6, 5, 0), 2, site(7)) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))

    def test_a_users_sampler_is_all_that_a_new_method_needs(self):
        state = rosa_func.init(torch.nn.Linear(5, 4), 2, sampler=first_rows_sampler, exact=True)
        assert not state["frozen", "weight"][:2].any()

    @pytest.mark.parametrize("exact", [None, True])
    @pytest.mark.parametrize("shapes", [((3, 2), (2, 5)), ((1, 2), (2, 4)), ((1, 2), (3, 5))])
    def test_factors_of_other_shapes_are_refused(self, exact, shapes):
        def other(W, r, site):
            return [W.new_ones(shape) for shape in shapes]

        model = torch.nn.Linear(5, 1)
        state = rosa_func.init(model, 1, exact=exact)
        for draw in (
            lambda: rosa_func.init(model, 1, sampler=other, exact=exact),
            lambda: rosa_func.resample(state, 1, sampler=other),
        ):
            with pytest.raises(ValueError, match=r"factors of weight have shapes .* not \(1, 5\)"):
                draw()

    @pytest.mark.parametrize("exact", [None, True])
    def test_factors_that_are_views_of_the_weight_become_copies(self, exact):
        model = torch.nn.Linear(5, 4)
        state = rosa_func.init(model, 2, sampler=first_rows_sampler, exact=exact)
        new = rosa_func.resample(state, 1, sampler=first_rows_sampler)
        for s in (state, new):
            assert torch.equal(s["trainable", "weight", "B"], model.weight[:2])
            assert torch.equal(rosa_func.merge(s)["weight"], model.weight)
        paths = [("frozen", "weight"), ("trainable", "weight", "B")]
        tensors = [s[path] for s in (state, new) for path in paths]
        assert len(storage_pointers([model.weight, *tensors])) == 5
