"""The recipe of robust adaptation: some low-rank steps, a support by gradients, then both."""

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

import rosa_func
from models import gpt2_and_rosa_module as gpt2_and_module
from models import randn, token_ids, two_layers
from references import relative_distance, state_bytes
from rosa_func import distributed, optim, sparse
from rosa_func.weight.layout import leaves

KEY = 7


def batches(count: int = 3) -> list[Tensor]:
    return [randn(5, 6, seed=seed) for seed in range(count)]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def steps(
    model: nn.Module, state: TensorDict, optimizer: torch.optim.Optimizer, count: int = 4
) -> None:
    for x in batches(count):
        optimizer.zero_grad()
        loss(rosa_func.adapted(model, state), x).backward()
        optimizer.step()


def trained(r: int = 2) -> tuple[nn.Module, TensorDict, torch.optim.Optimizer]:
    """Return a model, a state of it after a few low-rank steps, and their optimizer."""
    model = two_layers()
    state = rosa_func.init(model, r, key=KEY)
    optimizer = torch.optim.AdamW(optim.groups(state), 0.01, weight_decay=0.0)
    steps(model, state, optimizer)
    return model, state, optimizer


def largest_of_dense_gradients(
    model: nn.Module, state: TensorDict, density: float
) -> dict[str, list[int]]:
    """Return the places by autograd of the dense weights, in float64, and a stable sort."""
    weights = {
        name: weight.double().requires_grad_() for name, weight in rosa_func.merge(state).items()
    }
    squares = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for x in batches():
        out = torch.func.functional_call(model, weights, (x.double(),))
        value = (out - x.double().sum(1, keepdim=True)).square().mean()
        for name, gradient in zip(
            weights, torch.autograd.grad(value, list(weights.values())), strict=True
        ):
            squares[name] += gradient.square()
    found = {}
    for name in state["input_dim"].keys():
        order = squares[name].flatten().argsort(descending=True, stable=True)
        found[name] = sorted(order[: int(density * order.numel())].tolist())
    return found


def supports(state: TensorDict) -> dict[str, list[int]]:
    return {name: value["support"].tolist() for name, value in state["fixed"].items()}


class TestBegin:
    @pytest.mark.parametrize("restart", [False, True])
    def test_the_support_is_where_the_gradients_at_the_trained_weights_are_largest(
        self, restart: bool
    ):
        """And not at the pretrained ones, from which a restart goes on."""
        model, state, _ = trained()
        start = rosa_func.init(model, 2, key=KEY) if restart else None
        new = sparse.begin(model, state, batches(), loss, 0.25, start=start)
        assert supports(new) == largest_of_dense_gradients(model, state, 0.25)
        assert supports(new) != largest_of_dense_gradients(
            model, rosa_func.init(model, 2, key=KEY), 0.25
        )

    @pytest.mark.parametrize("restart", [False, True])
    def test_the_function_is_that_of_the_state_to_go_on_with(self, restart: bool):
        model, state, _ = trained()
        start = rosa_func.init(model, 2, key=KEY)
        before = [state_bytes(s.detach()) for s in (state, start)]
        new = sparse.begin(model, state, batches(), loss, 0.25, start=start if restart else None)
        assert [state_bytes(s.detach()) for s in (state, start)] == before
        expected = rosa_func.merge(start if restart else state)
        for name, weight in rosa_func.merge(new).items():
            assert torch.equal(weight, expected[name])
        assert not any(leaf.any() for name, leaf in leaves(new).items() if "values" in name)

    def test_without_a_restart_the_moments_of_the_factors_go_on(self):
        model, state, optimizer = trained()
        new = sparse.begin(model, state, batches(), loss, 0.25)
        before = {name: dict(optimizer.state[leaf]) for name, leaf in leaves(state).items()}
        named = rosa_func.named_parameters(new)
        values = [leaf for name, leaf in named.items() if name.endswith(".values")]
        optimizer.add_param_group({"params": values, "lr": 0.003})
        assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.01, 0.003]
        for name, slots in before.items():
            assert optimizer.state[leaves(new)[name]]["exp_avg"] is slots["exp_avg"]
        steps(model, new, optimizer, 1)
        for name, leaf in leaves(new).items():
            assert optimizer.state[leaf]["step"] == (1 if "values" in name else 5)
        # Adam's first step is the rate, whatever the gradient is, but for eps.
        largest = max(float(leaf.detach().abs().max()) for leaf in values)
        assert largest == pytest.approx(0.003, rel=1e-3)

    def test_a_restart_is_a_run_that_knew_the_support(self):
        """Bit for bit: the low-rank steps leave the support alone behind."""
        model, state, _ = trained()
        found = sparse.support(sparse.scores(model, state, batches(), loss), 0.25)
        start = rosa_func.init(model, 2, key=KEY)
        known = sparse.add(rosa_func.init(model, 2, key=KEY), found)
        ends = []
        for new in (sparse.begin(model, state, batches(), loss, 0.25, start=start), known):
            optimizer = torch.optim.AdamW(
                optim.groups(new, values={"lr": 0.003}), 0.01, weight_decay=0.0
            )
            steps(model, new, optimizer)
            ends.append(state_bytes(new.detach()))
        assert ends[0] == ends[1]

    def test_without_a_density_the_number_of_places_stays_and_the_old_part_is_merged(self):
        model, state, _ = trained()
        first = sparse.begin(model, state, batches(), loss, {"0.weight": 0.25, "2.weight": 0.1})
        leaves(first)["0.weight.values"].data.fill_(0.5)
        new = sparse.begin(model, first, batches(), loss)
        assert [len(places) for places in supports(new).values()] == [6, 3]
        assert supports(new) != supports(first)
        assert not leaves(new)["0.weight.values"].any()
        one, other = (rosa_func.merge(s)["0.weight"] for s in (first, new))
        assert relative_distance(one, other) <= 1e-6

    def test_a_sparse_part_alone(self):
        model = two_layers()
        state = rosa_func.init(model, 0)
        new = sparse.begin(model, state, batches(), loss, 0.25)
        assert supports(new) == largest_of_dense_gradients(model, state, 0.25)
        assert rosa_func.count(new).trainable == 6 + 8

    def test_what_is_wrong_is_said_and_nothing_is_changed(self):
        model, state, _ = trained()
        before = state_bytes(state.detach())
        with pytest.raises(ValueError, match="density is None for the places of a sparse part"):
            sparse.begin(model, state, batches(), loss)
        with pytest.raises(ValueError, match="batches is empty"):
            sparse.begin(model, state, [], loss, 0.25)
        with pytest.raises(KeyError, match=r"2\.weight has a support, and is no adapted weight"):
            start = rosa_func.init(model, 2, targets="0")
            sparse.begin(model, state, batches(), loss, 0.25, start=start)
        assert state_bytes(state.detach()) == before

    def test_one_process_begins_by_itself(self):
        model, state, _ = trained()
        one = distributed.begin(model, state, batches(), loss, 0.25)
        other = sparse.begin(model, state, batches(), loss, 0.25)
        assert state_bytes(one.detach()) == state_bytes(other.detach())


class TestStateOfAModule:
    def test_a_state_is_taken_in_place(self):
        model, module = gpt2_and_module()
        _, other = gpt2_and_module(key=1)
        ids, parameters = token_ids(2, 8), list(module.parameters())
        given: Any = other.state.detach().clone()
        module.state = given
        assert [id(p) for p in module.parameters()] == [id(p) for p in parameters]
        assert state_bytes(module.state.detach()) == state_bytes(given)
        assert torch.equal(module(ids).logits, rosa_func.call(model, given, ids).logits)
        module.load_state_dict({n: torch.zeros_like(t) for n, t in module.state_dict().items()})
        assert state_bytes(other.state.detach()) == state_bytes(given)

    def test_a_state_of_another_structure_is_refused(self):
        model, module = gpt2_and_module()
        before = state_bytes(module.state.detach())
        state = rosa_func.init(model, 3, targets=["wte", "c_attn", "c_fc"], train="ln_f")
        with pytest.raises(ValueError, match=r"trainable\.transformer\.\S+\.A differs"):
            module.state = state
        state = module.state.detach()
        state = sparse.add(state, sparse.support_random(state, {"wte": 0.1}, key=0))
        with pytest.raises(ValueError, match=r"fixed\.transformer\.wte\.weight\.support differs"):
            module.state = state
        assert state_bytes(module.state.detach()) == before
