"""What else a state with sparse parts can do: rebind, delta, exports, processes, modules."""

from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

import rosa_func
from models import randn, seeded
from references import dense_weights, perturbed, relative_distance, state_bytes
from rosa_func import checkpoint, export, optim, samplers, sparse
from rosa_func.module import RosaModule
from rosa_func.weight.layout import leaves

X = randn(5, 6)


def make_model() -> nn.Sequential:
    return seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7)))


def trained(r: int = 2, density: float = 0.2, **options: object) -> TensorDict:
    """Return a state with sparse parts, as if trained."""
    state = rosa_func.init(make_model(), r, sampler=samplers.lora, train="0.bias", **options)
    return perturbed(sparse.add(state, sparse.support_random(state, density, key=1)))


def stepped(state: TensorDict, make: type[torch.optim.Optimizer] = torch.optim.AdamW, **options):
    """Return an optimizer of the state after a step."""
    optimizer = make(rosa_func.parameters(state), lr=1e-2, **options)
    rosa_func.call(make_model(), state, X).square().sum().backward()
    optimizer.step()
    return optimizer


class TestOptimizers:
    def test_groups_give_the_values_a_rate_of_their_own(self):
        state = trained()
        groups = optim.groups(state, input={"lr": 1.0}, values={"lr": 2.0}, full={"lr": 3.0})
        rates = {id(leaf): group.get("lr") for group in groups for leaf in group["params"]}
        named = leaves(state)
        expected = {"B": 1.0, "A": None, "values": 2.0, "bias": 3.0}
        assert {n: rates[id(leaf)] for n, leaf in named.items()} == {
            name: expected[name.rpartition(".")[2]] for name in named
        }

    def test_values_can_be_left_frozen(self):
        state = trained()
        optim.groups(state, values=None)
        assert not any("values" in name for name in rosa_func.named_parameters(state))

    @pytest.mark.parametrize("moments", ["reset", "project", "keep"])
    def test_moments_of_the_values_live_on_over_a_resample(self, moments: str):
        state = trained()
        optimizer = stepped(state)
        before = {
            name: {slot: value.clone() for slot, value in optimizer.state[leaf].items()}
            for name, leaf in leaves(state).items()
            if "values" in name
        }
        new = rosa_func.resample(state, 1)
        optim.rebind(optimizer, state, new, moments=moments)
        for name, slots in before.items():
            after = optimizer.state[leaves(new)[name]]
            assert all(torch.equal(after[slot], value) for slot, value in slots.items())

    def test_moments_start_again_on_another_support(self):
        state = trained()
        optimizer = stepped(state)
        bare = sparse.remove(rosa_func.resample(state, 1))
        new = sparse.add(bare, sparse.support_random(bare, 0.2, key=2))
        optim.rebind(optimizer, state, new)
        for name, leaf in leaves(new).items():
            assert bool(optimizer.state.get(leaf)) == (name == "0.bias")

    def test_an_optimizer_goes_on_when_a_sparse_part_is_added(self):
        state = rosa_func.init(make_model(), 2)
        optimizer = stepped(state)
        new = sparse.add(state, sparse.support_random(state, 0.2, key=1))
        old, named = leaves(state), rosa_func.named_parameters(new)
        assert all(named[name] is leaf for name, leaf in old.items())
        optimizer.add_param_group({"params": [v for n, v in named.items() if n not in old]})
        start = {name: leaf.detach().clone() for name, leaf in named.items()}
        optimizer.zero_grad()
        rosa_func.call(make_model(), new, X).square().sum().backward()
        optimizer.step()
        assert not any(torch.equal(start[name], leaf) for name, leaf in named.items())


class TestDelta:
    @pytest.mark.parametrize("r", [0, 2])
    def test_the_sparse_part_goes_out_as_places_and_values(self, r: int, tmp_path: Path):
        model, state = make_model(), trained(r)
        change = checkpoint.delta(state, model)
        for name in ("0.weight", "2.weight"):
            assert change["change", name, "A"].shape[-1] <= r
            assert torch.equal(change["sparse", name, "values"], state["trainable", name, "values"])
            assert torch.equal(change["sparse", name, "support"], state["fixed", name, "support"])
        checkpoint.save(tmp_path / "delta.safetensors", change)
        loaded, _ = checkpoint.load(tmp_path / "delta.safetensors")
        weights = checkpoint.apply_delta(model, loaded)
        for name, W in rosa_func.merge(state).items():
            assert relative_distance(weights[name], W) <= 3e-7, name

    def test_a_delta_of_another_model_is_refused(self):
        change = checkpoint.delta(trained(), make_model())
        with pytest.raises(ValueError, match="has it of shape"):
            checkpoint.apply_delta(
                nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 7)), change
            )


class TestExport:
    def test_a_plain_module_has_the_sparse_part_merged(self):
        state = trained()
        merged = export.to_module(make_model(), state)
        for name, W in dense_weights(state).items():
            assert relative_distance(merged.state_dict()[name], W) <= 1e-6, name

    def test_peft_has_no_place_for_it(self, tmp_path: Path):
        with pytest.raises(ValueError, match=r"0\.weight has a sparse part"):
            export.to_peft(tmp_path, make_model(), trained())
        assert not list(tmp_path.iterdir())

    def test_a_sparse_part_that_was_not_trained_is_no_obstacle(self, tmp_path: Path):
        state = rosa_func.init(make_model(), 2)
        state = sparse.add(state, sparse.support_random(state, 0.2, key=1))
        assert max(export.to_peft(tmp_path, make_model(), state).values()) <= 1e-6


class TestModule:
    def test_a_module_trains_resamples_and_is_loaded(self):
        module = RosaModule(make_model(), trained())
        optimizer = torch.optim.AdamW(module.parameters(), 1e-2, weight_decay=0.0)
        support = module.state["fixed", "0.weight", "support"].clone()

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = module(X).square().sum()
            loss.backward()
            optimizer.step()
            return loss

        first = step()
        before = module(X).detach()
        module.resample(key=1, optimizer=optimizer)
        assert relative_distance(module(X), before) <= 1e-5
        assert not module.state["trainable", "0.weight", "values"].any()
        assert torch.equal(module.state["fixed", "0.weight", "support"], support)
        assert step() < first
        other = RosaModule(make_model(), trained())
        other.load_state_dict(module.state_dict())
        assert state_bytes(other.state) == state_bytes(module.state)
