"""An optimizer across a resample: what is kept, what is reset, what is refused."""

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn

import rosa_func
from models import randn, seeded, tiny_gpt2, token_ids
from optimizers import (
    MODES,
    NOT_KEPT,
    OPTIMIZERS,
    PROJECTED,
    identical,
    make_model,
    make_state,
    optimizer_snapshot,
    train,
    trained,
)
from references import dense_weights, relative_distance, state_bytes
from rosa_func.module import RosaModule
from rosa_func.weight.layout import leaves


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
    @pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in NOT_KEPT])
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
            ("ASGD", "keep", "'ax' of ASGD .for 0.weight.A. holds weights"),
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

    def test_rebind_refuses_leaves_of_another_device_and_copies_that_are_no_leaves(self):
        optimizer, state = trained("Adam")
        new = rosa_func.resample(state, 1)
        with pytest.raises(ValueError, match=r"0\.weight\.A went from cpu to meta: move a state"):
            rosa_func.optim.rebind(optimizer, state, new.to("meta"))
        rosa_func.parameters(new)
        with pytest.raises(ValueError, match=r"0\.weight\.A is not a leaf.*detach\(\)\.clone"):
            rosa_func.optim.rebind(optimizer, state, new.clone())

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

    def test_groups_refuses_a_copy_that_is_no_leaf(self):
        state = make_state()
        rosa_func.parameters(state)
        with pytest.raises(ValueError, match=r"0\.weight\.A is not a leaf"):
            rosa_func.optim.groups(state.clone(), input=None)

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


class TestAccumulation:
    def test_gradients_of_old_factors_do_not_reach_the_new_ones(self):
        """Half of an accumulated gradient was that of another subspace."""
        model = make_model()
        module = RosaModule(model, make_state())
        x, y = randn(8, 7), randn(8, 7, seed=1)

        def gradients(state: TensorDict, batch: Tensor) -> dict[str, Tensor]:
            free = {name: leaf.detach().clone() for name, leaf in leaves(state).items()}
            for leaf in free.values():
                leaf.requires_grad_()
            parts = {n: {f: free[f"{n}.{f}"] for f in "AB"} for n in ("0.weight", "2.weight")}
            parts |= {n: free[n] for n in ("0.bias", "2.bias")}  # type: ignore[misc]
            dense = dense_weights(state.replace(trainable=TensorDict(parts)))
            torch.func.functional_call(model, dense, (batch,)).square().sum().backward()
            return {name: leaf.grad for name, leaf in free.items() if leaf.grad is not None}

        module(x).square().sum().backward()
        first = gradients(module.state.detach(), x)
        module.resample(1)
        module(y).square().sum().backward()
        second = gradients(module.state.detach(), y)
        assert len(first) == len(second) == 6
        for name, leaf in leaves(module.state).items():
            expected = first[name] + second[name] if name.endswith("bias") else second[name]
            torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=1e-5)


class TestAverages:
    def test_an_average_of_merged_models_goes_over_resamples(self):
        """AveragedModel of a RosaModule mixed the factors of two subspaces: 0.26 off."""
        model = seeded(tiny_gpt2)
        state = rosa_func.init(model, 2)
        optimizer = torch.optim.AdamW(rosa_func.parameters(state), 1e-2)
        ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
        average = torch.optim.swa_utils.AveragedModel(
            rosa_func.export.to_module(model, state), multi_avg_fn=ema
        )
        expected: dict[str, Tensor] = {}
        for step in range(4):
            if step == 2:
                new = rosa_func.resample(state, step)
                rosa_func.optim.rebind(optimizer, state, new)
                state = new
            optimizer.zero_grad()
            rosa_func.call(
                model, state, token_ids(2, 6, seed=step)
            ).logits.square().mean().backward()
            optimizer.step()
            average.update_parameters(rosa_func.export.to_module(model, state))
            weights = {name: W.detach().double() for name, W in dense_weights(state).items()}
            expected = {n: (expected.get(n, W) + W) / 2 for n, W in weights.items()}
        for name, parameter in average.module.named_parameters():
            # Three halvings of float32 weights that were themselves formed in float32.
            assert relative_distance(parameter.double(), expected[name]) <= 8 * 2**-24
        assert average.module.lm_head.weight is average.module.transformer.wte.weight


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
