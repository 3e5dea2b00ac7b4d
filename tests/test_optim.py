"""An optimizer across a resample: what is kept, what is reset, what is projected."""

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn

import rosa_func
from models import randn, seeded
from references import state_bytes
from rosa_func import samplers
from rosa_func._carry import gradient_moment
from rosa_func.weight.layout import leaves

Make = Callable[[Any], torch.optim.Optimizer]

optim = torch.optim
OPTIMIZERS: dict[str, Make] = {
    "SGD": partial(optim.SGD, lr=1e-2),
    "momentum": partial(optim.SGD, lr=1e-2, momentum=0.9),
    "Adam": partial(optim.Adam, lr=1e-2),
    "AdamW": partial(optim.AdamW, lr=1e-2, weight_decay=0.0, amsgrad=True),
    "NAdam": partial(optim.NAdam, lr=1e-2),
    "RAdam": partial(optim.RAdam, lr=1e-2),
    "Adagrad": partial(optim.Adagrad, lr=1e-2, initial_accumulator_value=0.1),
    "Adafactor": partial(optim.Adafactor, lr=1e-2),
    "RMSprop": partial(optim.RMSprop, lr=1e-2, centered=True, momentum=0.5),
    "Adadelta": partial(optim.Adadelta, lr=1e-2),
    "Adamax": partial(optim.Adamax, lr=1e-2),
    "ASGD": partial(optim.ASGD, lr=1e-2),
    "Rprop": partial(optim.Rprop, lr=1e-2),
}
PROJECTED = ["SGD", "momentum", "Adam", "AdamW", "NAdam", "RAdam", "Adagrad", "Adafactor"]
MODES: dict[str, dict[str, Any]] = {
    "reset": {},
    "keep": {},
    "prune": {"fraction": 0.5},
    "project": {},
}


def make_model() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5)))


def make_state(r: int = 2, **options: Any) -> TensorDict:
    return rosa_func.init(make_model(), r, train="*.bias", **options)


def train(optimizer: torch.optim.Optimizer, state: TensorDict, steps: range) -> None:
    """Take steps on data that depends on the step alone."""
    model = make_model()
    for step in steps:
        x, y = randn(8, 7, seed=step), randn(8, 5, seed=100 + step)
        optimizer.zero_grad()
        (rosa_func.call(model, state, x) - y).square().mean().backward()
        optimizer.step()


def trained(name: str, r: int = 2, steps: int = 4) -> tuple[torch.optim.Optimizer, TensorDict]:
    state = make_state(r)
    optimizer = OPTIMIZERS[name](rosa_func.parameters(state))
    train(optimizer, state, range(steps))
    return optimizer, state


def optimizer_snapshot(optimizer: torch.optim.Optimizer) -> Any:
    return copy.deepcopy(optimizer.state_dict())


def identical(one: Any, other: Any) -> bool:
    """Compare two state dicts bit for bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(identical(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(identical, one, other))
    return one == other


class TestWhatRebindKeeps:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_rebinding_equal_factors_changes_nothing(self, name: str, mode: str):
        optimizer, state = trained(name)
        train(optimizer, state, range(4, 8))
        other, begun = trained(name)
        clone = begun.apply(lambda t: t.detach().clone())
        rosa_func.optim.rebind(other, begun, clone, moments=mode, **MODES[mode])
        train(other, clone, range(4, 8))
        for one, two in zip(leaves(state).values(), leaves(clone).values(), strict=True):
            assert torch.equal(one, two)
        assert identical(optimizer_snapshot(optimizer), optimizer_snapshot(other))

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("name", PROJECTED)
    def test_tensors_trained_in_full_keep_their_moments(self, name: str, mode: str):
        optimizer, state = trained(name)
        bias = state["trainable", "0.bias"]
        before = copy.deepcopy(optimizer.state.get(bias, {}))
        new = rosa_func.resample(state, 1)
        rosa_func.optim.rebind(optimizer, state, new, moments=mode, **MODES[mode])
        assert identical(optimizer.state.get(new["trainable", "0.bias"], {}), before)
        assert bias not in optimizer.state

    def test_rebinding_keeps_groups_rates_and_the_schedule(self):
        def rates(every: int | None) -> list[list[float]]:
            state = make_state()
            groups = rosa_func.optim.groups(state, output={"lr": 0.1}, full={"weight_decay": 0.5})
            optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.0)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
            trace = []
            for step in range(12):
                if every and step and step % every == 0:
                    new = rosa_func.resample(state, step)
                    assert rosa_func.optim.rebind(optimizer, state, new) is optimizer
                    state = new
                train(optimizer, state, range(step, step + 1))
                schedule.step()
                trace.append([group["lr"] for group in optimizer.param_groups])
            decays = [group["weight_decay"] for group in optimizer.param_groups]
            assert decays == [0.0, 0.0, 0.5]
            held = [id(p) for group in optimizer.param_groups for p in group["params"]]
            assert sorted(held) == sorted(map(id, leaves(state).values()))
            return trace

        assert rates(every=3) == rates(every=None)

    def test_rebinding_leaves_other_parameters_and_omitted_factors_alone(self):
        state, other = make_state(), nn.Parameter(torch.ones(3))
        groups = rosa_func.optim.groups(state, input=None, full=None)
        optimizer = torch.optim.Adam([*groups, {"params": [other]}])
        train(optimizer, state, range(2))
        new = rosa_func.resample(state, 1)
        rosa_func.optim.rebind(optimizer, state, new)
        assert optimizer.param_groups[1]["params"][0] is other
        assert [p.shape for p in optimizer.param_groups[0]["params"]] == [(6, 2), (5, 2)]
        flags = {name: leaf.requires_grad for name, leaf in leaves(new).items()}
        assert flags == {name: name.endswith(".A") for name in flags}


class TestReset:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_the_first_step_after_a_reset_is_that_of_a_new_optimizer(self, name: str):
        optimizer, state = trained(name, steps=50)
        new = rosa_func.resample(state, 1)
        copied = new.apply(lambda t: t.detach().clone())
        rosa_func.optim.rebind(optimizer, state, new)
        train(optimizer, new, range(1))
        train(OPTIMIZERS[name](rosa_func.parameters(copied)), copied, range(1))
        for (leaf, one), two in zip(leaves(new).items(), leaves(copied).values(), strict=True):
            assert leaf.endswith("bias") or torch.equal(one, two)

    def test_an_optimizer_that_has_not_stepped_can_be_rebound(self):
        state = make_state()
        optimizer = torch.optim.Adam(rosa_func.parameters(state))
        for mode, options in MODES.items():
            new = rosa_func.resample(state, 1)
            rosa_func.optim.rebind(optimizer, state, new, moments=mode, **options)
            state = new
        train(optimizer, state, range(1))


class TestKeepAndPrune:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_keep_hands_over_the_moments_bit_for_bit(self, name: str):
        optimizer, state = trained(name)
        before = optimizer_snapshot(optimizer)
        new = rosa_func.resample(state, 1)
        rosa_func.optim.rebind(optimizer, state, new, moments="keep")
        assert identical(optimizer_snapshot(optimizer), before)
        train(optimizer, new, range(1))

    @given(fraction=st.floats(0, 1), name=st.sampled_from(["Adam", "momentum", "Adamax"]))
    def test_prune_zeroes_the_smallest_of_each_moment_and_exactly_that_many(
        self, fraction: float, name: str
    ):
        optimizer, state = trained(name)
        A = state["trainable", "0.weight", "A"]
        before = copy.deepcopy(optimizer.state[A])
        new = rosa_func.resample(state, 1)
        rosa_func.optim.rebind(optimizer, state, new, moments="prune", fraction=fraction)
        after = optimizer.state[new["trainable", "0.weight", "A"]]
        for slot, old in before.items():
            if old.ndim == 0:
                assert torch.equal(after[slot], old)
                continue
            zeroed = (after[slot] == 0) & (old != 0)
            assert zeroed.sum() == round(fraction * old.numel())
            assert torch.equal(after[slot][~zeroed], old[~zeroed])
            if zeroed.any() and not zeroed.all():
                assert old[zeroed].abs().max() <= old[~zeroed].abs().min()


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
        counts = [slots.get("step") for slots in optimizer.state.values()]
        rosa_func.optim.rebind(optimizer, state, new, moments="project")
        assert (
            identical([slots.get("step") for slots in optimizer.state.values()], counts) or counts
        )
        for slots in optimizer.state.values():
            if "exp_avg_sq" in slots:
                assert (slots["exp_avg_sq"] >= slots["exp_avg"].square() * (1 - 1e-6)).all() or (
                    slots["exp_avg"].ndim == 1
                )
        train(optimizer, new, range(4, 8))
        assert all(leaf.isfinite().all() for leaf in leaves(new).values())


class TestRebindRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"moments": "forget"}, "reset, project, keep, prune, got 'forget'"),
            ({"moments": "prune"}, "fraction=None with moments='prune'"),
            ({"moments": "keep", "fraction": 0.5}, "fraction=0.5 with moments='keep'"),
            ({"moments": "prune", "fraction": 1.5}, r"\[0, 1\], got 1.5"),
        ],
    )
    def test_rebind_refuses_wrong_options(self, options: dict[str, Any], message: str):
        optimizer, state = trained("Adam")
        before, held = optimizer_snapshot(optimizer), optimizer.param_groups[0]["params"][:]
        with pytest.raises(ValueError, match=message):
            rosa_func.optim.rebind(optimizer, state, rosa_func.resample(state, 1), **options)
        assert identical(optimizer_snapshot(optimizer), before)
        assert all(map(lambda a, b: a is b, held, optimizer.param_groups[0]["params"]))

    @pytest.mark.parametrize(
        ("name", "mode", "message"),
        [
            ("Adam", "keep", r"0.weight.A went from shape \(6, 2\) to \(6, 3\)"),
            ("Adam", "prune", "rank that changes"),
            ("Adamax", "project", "'exp_inf' of this optimizer is"),
            ("RMSprop", "project", "'grad_avg' of this optimizer is"),
        ],
    )
    def test_rebind_refuses_moments_that_a_mode_cannot_carry(
        self, name: str, mode: str, message: str
    ):
        optimizer, state = trained(name)
        before = optimizer_snapshot(optimizer)
        new = rosa_func.resample(state, 1, r=3)
        with pytest.raises(ValueError, match=message):
            rosa_func.optim.rebind(optimizer, state, new, moments=mode, **MODES[mode])
        assert identical(optimizer_snapshot(optimizer), before)
        assert optimizer.param_groups[0]["params"][0] is state["trainable", "0.weight", "A"]

    def test_rebind_refuses_lbfgs(self):
        state = make_state()
        optimizer = torch.optim.LBFGS(rosa_func.parameters(state))
        with pytest.raises(ValueError, match="make a new LBFGS"):
            rosa_func.optim.rebind(optimizer, state, rosa_func.resample(state, 1))

    def test_rebind_refuses_states_that_do_not_belong_together(self):
        optimizer, state = trained("Adam")
        other = rosa_func.init(make_model(), 2)
        with pytest.raises(KeyError, match=r"0.bias is in only one"):
            rosa_func.optim.rebind(optimizer, state, other)
        with pytest.raises(ValueError, match="no leaf of old_state"):
            rosa_func.optim.rebind(optimizer, make_state(), rosa_func.resample(state, 1))


class TestGroups:
    def test_every_leaf_is_in_one_group_with_its_options(self):
        state = make_state()
        groups = rosa_func.optim.groups(
            state, output={"lr": 1.0}, input={"lr": 2.0}, full={"lr": 3.0}
        )
        named = leaves(state)
        expected = {name: {"A": 1.0, "B": 2.0}.get(name[-1], 3.0) for name in named}
        found = {id(p): group["lr"] for group in groups for p in group["params"]}
        assert {name: found[id(leaf)] for name, leaf in named.items()} == expected
        assert all(leaf.requires_grad for leaf in named.values())

    def test_groups_refuses_options_that_it_cannot_use(self):
        training, fresh = (rosa_func.init(make_model(), 2) for _ in range(2))
        assert len(rosa_func.optim.groups(training)) == 2  # none in full
        for state in (training, fresh):  # the leaves of the first require gradients
            before = state_bytes(state)  # with the flags
            with pytest.raises(ValueError, match="options of input have 'params'"):
                rosa_func.optim.groups(state, output=None, input={"params": []})
            with pytest.raises(ValueError, match="no tensor is left"):
                rosa_func.optim.groups(state, output=None, input=None)
            assert state_bytes(state) == before


class TestRewarm:
    @given(every=st.integers(1, 9), data=st.data())
    def test_the_rate_rises_after_each_resample_and_is_the_schedule_elsewhere(
        self, every: int, data: st.DataObject
    ):
        steps = data.draw(st.integers(0, every - 1))
        factor = rosa_func.optim.rewarm(lambda step: 0.9**step, every, steps)
        for step in range(4 * every):
            share = factor(step) / 0.9**step
            warm = step >= every and step % every < steps
            expected = (step % every + 1) / (steps + 1) if warm else 1.0
            assert share == pytest.approx(expected)
            if not steps:
                assert factor(step) == 0.9**step

    @given(resamples=st.sets(st.integers(1, 30)), warmup=st.integers(0, 3), regular=st.booleans())
    def test_the_rate_rises_from_the_last_resample_where_cycles_differ(
        self, resamples: set[int], warmup: int, regular: bool
    ):
        starts = sorted(resamples)
        if regular:
            starts = list(range(0, 30, 7))  # the first cycle begins at 0 and has no ramp
        steps = min([warmup, *(b - a - 1 for a, b in itertools.pairwise(starts))])
        factor = rosa_func.optim.rewarm(lambda step: 0.9**step, starts, steps)
        for step in range(40):
            last = max((start for start in starts if start <= step), default=0)
            expected = min(1.0, (step - last + 1) / (steps + 1)) if last else 1.0
            assert factor(step) == pytest.approx(0.9**step * expected)
        if regular:
            other = rosa_func.optim.rewarm(lambda step: 0.9**step, 7, steps)
            assert [factor(step) for step in range(35)] == [other(step) for step in range(35)]

    def test_rewarm_refuses_wrong_steps(self):
        with pytest.raises(ValueError, match="positive number of steps, got 0"):
            rosa_func.optim.rewarm(lambda step: 1.0, 0, 0)
        for every in (3, [1, 10, 13]):
            with pytest.raises(ValueError, match=r"\[0, 3\), the steps from one .*; got 3"):
                rosa_func.optim.rewarm(lambda step: 1.0, every, 3)
        with pytest.raises(ValueError, match="got -1"):
            rosa_func.optim.rewarm(lambda step: 1.0, [5], -1)
        with pytest.raises(ValueError, match="steps counted from 0, got -5"):
            rosa_func.optim.rewarm(lambda step: 1.0, [5, -5], 1)
        with pytest.raises(TypeError):
            rosa_func.optim.rewarm(lambda step: 1.0, 3.5, 1)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            rosa_func.optim.rewarm(lambda step: 1.0, [3.5], 1)  # type: ignore[list-item]
