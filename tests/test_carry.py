"""The mathematics of moments that are projected into another subspace."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import rosa_func
from models import randn
from optimizers import PROJECTED, make_state, train, trained
from rosa_func import samplers
from rosa_func._carry import gradient_moment
from rosa_func.weight.layout import leaves

shapes = st.tuples(st.integers(3, 6), st.integers(3, 6), st.integers(1, 3), st.integers(1, 3))


class TestProject:
    @given(shape=shapes, seed=st.integers(0, 2**32 - 1))
    def test_first_moments_are_those_of_the_least_squares_gradient(
        self, shape: tuple[int, int, int, int], seed: int
    ):
        m, n, r, _ = shape
        A, B, M_A, M_B = (
            randn(*size, seed=seed + i, dtype=torch.float64)
            for i, size in enumerate([(m, r), (r, n), (m, r), (r, n)])
        )
        left, right = gradient_moment(A, B, M_A, M_B, 1e-16)
        eye = partial(torch.eye, dtype=torch.float64)
        # G B^T = M_A and A^T G = M_B as one dense system in the entries of G, row by row.
        system = torch.cat([torch.kron(eye(m), B), torch.kron(A.T.contiguous(), eye(n))])
        wanted = torch.cat([M_A.flatten(), M_B.flatten()])
        least = (torch.linalg.pinv(system) @ wanted).view(m, n)
        torch.testing.assert_close(left @ right, least, rtol=1e-7, atol=1e-7)

    @given(shape=shapes, seed=st.integers(0, 2**32 - 1), missing=st.sampled_from("AB"))
    def test_a_factor_without_a_moment_adds_nothing_to_the_gradients_moment(
        self, shape: tuple[int, int, int, int], seed: int, missing: str
    ):
        m, n, r, _ = shape
        A, B = (randn(*s, seed=seed, dtype=torch.float64) for s in [(m, r), (r, n)])
        G = randn(m, n, seed=seed + 1, dtype=torch.float64)
        M_A, M_B = (None, A.T @ G) if missing == "A" else (G @ B.T, None)
        left, right = gradient_moment(A, B, M_A, M_B, 1e-16)
        span = torch.linalg.pinv(A.T) @ A.T @ G if missing == "A" else G @ torch.linalg.pinv(B) @ B
        torch.testing.assert_close(left @ right, span, rtol=1e-7, atol=1e-7)

    def test_a_zero_factor_gives_finite_moments(self):
        state = make_state(sampler=samplers.lora)
        optimizer = torch.optim.Adam(rosa_func.parameters(state))
        train(optimizer, state, range(1))
        new = rosa_func.resample(state, 1, sampler=samplers.lora)
        rosa_func.optim.rebind(optimizer, state, new, moments="project")
        train(optimizer, new, range(1, 3))
        assert all(leaf.isfinite().all() for leaf in leaves(new).values())

    @pytest.mark.parametrize("name", ["momentum", "Adam"])
    def test_project_gives_another_basis_of_the_same_subspace_its_moments(self, name: str):
        optimizer, state = trained(name)
        slot = "momentum_buffer" if name == "momentum" else "exp_avg"
        T = torch.tensor([[2.0, 1.0], [-1.0, 3.0]])
        new = state.apply(lambda t: t.detach().clone())
        G = randn(6, 7)
        A, B = (state["trainable", "0.weight", factor].detach() for factor in "AB")
        new["trainable", "0.weight"].update({"A": A @ T, "B": T.inverse() @ B})
        A2, B2 = (new["trainable", "0.weight", factor] for factor in "AB")
        # Moments of one G, in the old basis ...
        optimizer.state[state["trainable", "0.weight", "A"]][slot] = G @ B.T
        optimizer.state[state["trainable", "0.weight", "B"]][slot] = A.T @ G
        rosa_func.optim.rebind(optimizer, state, new, moments="project")
        # ... become those of the same G in the new one.
        torch.testing.assert_close(optimizer.state[A2][slot], G @ B2.T)
        torch.testing.assert_close(optimizer.state[B2][slot], A2.T @ G)

    @pytest.mark.parametrize("name", ["Adagrad", "Adafactor"])
    def test_projected_second_moments_of_equal_variance_along_a_row_are_exact(self, name: str):
        optimizer, state = trained(name)
        new = rosa_func.resample(state, 3, r=3)
        variance = torch.arange(1.0, 7.0)
        A, B2 = state["trainable", "0.weight", "A"], new["trainable", "0.weight", "B"]

        def second(B: Tensor) -> Tensor:
            return variance[:, None] * B.detach().square().sum(1)

        v, expected = second(state["trainable", "0.weight", "B"]), second(B2)
        slots = optimizer.state[A]
        if name == "Adagrad":
            slots["sum"] = v
        else:
            slots["row_var"], slots["col_var"] = v.mean(1, keepdim=True), v.mean(0, keepdim=True)
        rosa_func.optim.rebind(optimizer, state, new, moments="project")
        slots = optimizer.state[new["trainable", "0.weight", "A"]]
        if name == "Adagrad":
            torch.testing.assert_close(slots["sum"], expected)
        else:
            torch.testing.assert_close(slots["row_var"], expected.mean(1, keepdim=True))
            torch.testing.assert_close(slots["col_var"], expected.mean(0, keepdim=True))

    @pytest.mark.parametrize("name", PROJECTED)
    def test_projected_moments_have_the_shapes_and_counts_that_the_optimizer_needs(self, name: str):
        optimizer, state = trained(name)
        new = rosa_func.resample(state, 1, r=3)
        before = {name: dict(optimizer.state.get(p, {})) for name, p in leaves(state).items()}
        rosa_func.optim.rebind(optimizer, state, new, moments="project")
        for leaf, p in leaves(new).items():
            slots, old = optimizer.state.get(p, {}), before[leaf]
            assert slots.keys() == old.keys()
            for slot, value in slots.items():
                if value.ndim == 0:  # a count
                    assert torch.equal(value, old[slot])
                elif slot not in ("row_var", "col_var", "variance"):
                    assert value.shape == p.shape
        for slots in optimizer.state.values():
            if "exp_avg_sq" in slots:
                assert (slots["exp_avg_sq"] >= slots["exp_avg"].square() * (1 - 1e-6)).all() or (
                    slots["exp_avg"].ndim == 1
                )
        train(optimizer, new, range(4, 8))
        assert all(leaf.isfinite().all() for leaf in leaves(new).values())
