"""What optimizers of other packages keep: handed on untouched, or refused by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, optim

import rosa_func
from optimizers import (
    MODES,
    GroupCounted,
    Keeping,
    Make,
    Passing,
    QuantisedAdam,
    Wrapper,
    identical,
    make_state,
    optimizer_snapshot,
    train,
    trained,
)
from references import state_bytes
from rosa_func.weight.layout import leaves

SLOTS_OF_ADAM8BIT: dict[str, Callable[[Tensor], Any]] = {  # of bitsandbytes
    "step": lambda p: 1,
    "state1": lambda p: torch.zeros(p.shape, dtype=torch.uint8),
    "state2": lambda p: torch.zeros(p.shape, dtype=torch.uint8),
    "qmap1": lambda p: torch.linspace(-1, 1, 256),
    "qmap2": lambda p: torch.linspace(0, 1, 256),
    "absmax1": lambda p: torch.ones(1),
    "absmax2": lambda p: torch.ones(1),
}


class TestSlots:
    def trained(self, make: Make) -> tuple[torch.optim.Optimizer, TensorDict, TensorDict]:
        state = make_state()
        optimizer = make(rosa_func.parameters(state))
        train(optimizer, state, range(3))
        return optimizer, state, rosa_func.resample(state, 1)

    @pytest.mark.parametrize(
        "make",
        [
            QuantisedAdam,
            lambda params: Keeping(params, **SLOTS_OF_ADAM8BIT),
            lambda params: Keeping(params, moments=lambda p: [torch.ones(2), None]),
        ],
    )
    def test_keep_hands_the_same_objects_on(self, make: Make):
        """torchao's moments: NotImplementedError aten.abs, since they were pruned by nothing."""
        optimizer, state, new = self.trained(make)
        before = {name: dict(optimizer.state[leaf]) for name, leaf in leaves(state).items()}
        rosa_func.optim.rebind(optimizer, state, new, moments="keep")
        for name, leaf in leaves(new).items():
            slots = optimizer.state[leaf]
            assert slots.keys() == before[name].keys()
            assert all(slots[slot] is value for slot, value in before[name].items())
        assert not any(leaf in optimizer.state for leaf in leaves(state).values())

    def test_quantised_moments_that_were_kept_make_the_next_step(self):
        optimizer, state, new = self.trained(QuantisedAdam)
        slots = optimizer.state[leaves(state)["0.weight.A"]]
        m, v = (slots[slot].values() for slot in ("exp_avg", "exp_avg_sq"))
        rosa_func.optim.rebind(optimizer, state, new, moments="keep")
        A = leaves(new)["0.weight.A"]
        start = A.detach().clone()
        train(optimizer, new, range(1))  # the fourth step
        assert A.grad is not None
        m, v = 0.9 * m + 0.1 * A.grad, 0.999 * v + 0.001 * A.grad.square()
        moved = 1e-2 * m / (1 - 0.9**4) / ((v / (1 - 0.999**4)).sqrt() + 1e-8)
        torch.testing.assert_close(start - A, moved, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("mode", ["prune", "project"])
    @pytest.mark.parametrize(
        ("make", "slot"),
        [
            (lambda params: Keeping(params, **SLOTS_OF_ADAM8BIT), "absmax1"),
            (QuantisedAdam, "exp_avg"),
            (lambda params: Keeping(params, exp_avg=lambda p: p.to(torch.float8_e5m2)), "exp_avg"),
            (lambda params: Keeping(params, moments=lambda p: [torch.ones(2)]), "moments"),
            (partial(optim.Rprop, lr=1e-2), "prev"),
        ],
    )
    def test_modes_that_compute_know_their_slots_by_name(self, make: Make, slot: str, mode: str):
        """Pruned, the quantisation maps of bitsandbytes were zeroed: A moved by 60.8."""
        optimizer, state, new = self.trained(make)
        leaf = leaves(state)["0.weight.A"]
        before = dict(optimizer.state[leaf])
        with pytest.raises(ValueError, match=f"'{mode}' does not know what '{slot}' .*'keep'"):
            rosa_func.optim.rebind(optimizer, state, new, moments=mode, **MODES[mode])
        after = optimizer.state[leaf]
        assert all(after[slot] is value for slot, value in before.items())
        rosa_func.optim.rebind(optimizer, state, new, moments="keep")  # what the error advises

    @pytest.mark.parametrize("mode", ["keep", "prune", "project"])
    @pytest.mark.parametrize(
        ("slot", "value"),
        [
            *((slot, torch.clone) for slot in ("z", "ax", "slow_buffer", "slow_params", "anchor")),
            *((slot, torch.clone) for slot in ("lookahead_slow_buff", "prev_param", "ema_weights")),
            ("p0", lambda p: p.detach().flatten()[::2]),
            ("master_param", torch.Tensor.double),
        ],
    )
    def test_weights_are_not_taken_for_moments(self, slot: str, value: Any, mode: str):
        """Slow weights of the old subspace: loss from 0.0089 to 0.081 at the next sync."""
        optimizer, state, new = self.trained(
            lambda params: Keeping(params, exp_avg=torch.zeros_like, **{slot: value})
        )
        with pytest.raises(ValueError, match=f"'{slot}' of Keeping .* weights .* pass moments='re"):
            rosa_func.optim.rebind(optimizer, state, new, moments=mode, **MODES[mode])
        bias = dict(optimizer.state[leaves(state)["0.bias"]])
        rosa_func.optim.rebind(optimizer, state, new)
        assert leaves(new)["0.weight.A"] not in optimizer.state  # made anew, of the new factor
        assert all(optimizer.state[leaves(new)["0.bias"]][slot] is bias[slot] for slot in bias)
        train(optimizer, new, range(1))

    def test_a_slot_of_an_unknown_name_is_kept_with_a_warning(self):
        optimizer, state, new = self.trained(lambda params: Keeping(params, center=torch.clone))
        with pytest.warns(UserWarning, match="hands 'center' of Keeping on .* if it holds") as seen:
            rosa_func.optim.rebind(optimizer, state, new, moments="keep")
        assert {warning.filename for warning in seen} == {__file__}

    def test_a_wrapper_that_shows_the_slots_inside_is_rebound_as_what_it_wraps(self):
        """Adagrad's first sum was lost where accelerate wrapped it: its class was another."""
        results = []
        for wrap in (lambda inside: inside, Passing):
            inside, state = trained("Adagrad")
            optimizer, new = wrap(inside), rosa_func.resample(state, 1)
            rosa_func.optim.rebind(optimizer, state, new)
            assert optimizer.state[leaves(new)["0.weight.A"]]["sum"].eq(0.1).all()
            train(inside, new, range(2))
            results.append(state_bytes(new))
        assert results[0] == results[1]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("mode", MODES)
    def test_moments_have_the_dtype_of_leaves_that_were_cast(self, mode: str, dtype: torch.dtype):
        """The factors of a state cast to bfloat16 are drawn in float32: the next step failed."""
        state = make_state().apply(lambda t: t.to(dtype) if t.is_floating_point() else t)
        optimizer = torch.optim.Adam(rosa_func.parameters(state), 1e-2)

        def step(leaf: dict[str, Tensor]) -> None:
            optimizer.zero_grad()
            sum(p.square().sum() for p in leaf.values()).backward()  # type: ignore[union-attr]
            optimizer.step()

        step(leaves(state))
        new = rosa_func.resample(state, 1)
        assert leaves(new)["0.weight.A"].dtype == (torch.float32 if dtype.itemsize == 2 else dtype)
        new["trainable", "0.bias"] = new["trainable", "0.bias"].float()
        rosa_func.optim.rebind(optimizer, state, new, moments=mode, **MODES[mode])
        for leaf in leaves(new).values():
            assert optimizer.state.get(leaf, {"exp_avg": leaf})["exp_avg"].dtype == leaf.dtype
        step(leaves(new))
        assert all(leaf.isfinite().all() for leaf in leaves(new).values())


class TestWholeOptimizers:
    @pytest.mark.parametrize("wrap", [lambda inside: inside, Passing])
    def test_rebind_refuses_lbfgs(self, wrap: Any):
        state = make_state()
        optimizer = wrap(torch.optim.LBFGS(rosa_func.parameters(state)))
        with pytest.raises(ValueError, match="make a new LBFGS"):
            rosa_func.optim.rebind(optimizer, state, rosa_func.resample(state, 1))

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("several", [False, True])
    def test_a_wrapper_with_a_state_of_its_own_is_refused(self, mode: str, several: bool):
        """With SAM the moments of a bias trained in full were lost, and the old leaves kept."""
        inside, state = trained("AdamW")
        optimizer = Wrapper([inside] if several else inside)
        before = optimizer_snapshot(inside)
        with pytest.raises(
            ValueError, match=r"Wrapper has a state .* AdamW inside it, .* a new opt"
        ):
            rosa_func.optim.rebind(
                optimizer, state, rosa_func.resample(state, 1), moments=mode, **MODES[mode]
            )
        assert identical(optimizer_snapshot(inside), before)

    def test_what_is_kept_for_all_tensors_together_is_refused(self):
        """A third-party LBFGS keeps its history under a string: it went on with the old one."""
        optimizer, state = trained("Adam")
        optimizer.state["global_state"] = {"directions": [torch.ones(3)]}  # type: ignore[index]
        with pytest.raises(ValueError, match="Adam keeps an entry 'global_state' of all"):
            rosa_func.optim.rebind(optimizer, state, rosa_func.resample(state, 1))

    @pytest.mark.parametrize("count", ["k", "step"])
    def test_moments_are_not_started_again_under_the_count_of_a_group(self, count: str):
        """The first step after a reset was 3.2 times the rate: an old count corrects no bias."""
        state = make_state()
        optimizer = GroupCounted(rosa_func.parameters(state), count)
        train(optimizer, state, range(3))
        new = rosa_func.resample(state, 1)
        with pytest.raises(ValueError, match=f"GroupCounted counts .* in '{count}', .* a new opt"):
            rosa_func.optim.rebind(optimizer, state, new)
        rosa_func.optim.rebind(optimizer, state, new, moments="project")
        train(optimizer, new, range(1))
