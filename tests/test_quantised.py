"""Quantised residuals: memory, gradients, resampling with a master and without, files, merges."""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import rosa_func
from cases import adapt_every_weight
from models import randn, seeded, tiny_gpt2, token_ids, two_layers
from modules import ExpertsInOneProduct
from references import (
    dense_weights,
    model_snapshot,
    perturbed,
    relative_distance,
    state_bytes,
)
from rosa_func import _torch, checkpoint, export, quantised, samplers, sparse
from rosa_func.module import RosaModule
from rosa_func.weight import read
from rosa_func.weight.keeping import kept_as
from rosa_func.weight.layout import entries
from rosa_func.weight.quantised import Nf4

KINDS = ["nf4", "nf4_double", "int8"]
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
BESIDE = [samplers.additive, samplers.lora]  # whose product is zero at first


def layers(width: int = 64) -> nn.Sequential:
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(width, 2 * width), nn.Tanh(), Conv1D(width, 2 * width), nn.LayerNorm(width)
        )
    )


def state_of(model: nn.Module, kind: str = "nf4", **options: Any) -> TensorDict:
    return rosa_func.init(model, 3, quantize=kind, **options)


def distance(W: Tensor, other: Tensor) -> float:
    return float((W.double() - other.double()).norm() / other.double().norm())


def errors(model: nn.Module, state: TensorDict) -> dict[str, float]:
    """Return |what the model computes with - W| / |W| of each adapted weight."""
    own, merged = dict(model.named_parameters()), rosa_func.merge(state)
    return {name: distance(merged[name], own[name].detach()) for name in read(state).adapted()}


@contextmanager
def saved() -> Iterator[list[Tensor]]:
    """Give a list of the tensors that are kept for a backward inside."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


class TestStart:
    @EVERY_KIND
    def test_the_residual_is_quantised_after_the_product_is_taken_out(self, kind):
        model = layers()
        before = model_snapshot(model)
        state = state_of(model, kind, sampler=samplers.top)
        for name, w in read(state).adapted().items():
            A, B = (state["trainable", name, factor] for factor in "AB")
            R = dict(model.named_parameters())[name].detach() - A @ B
            steps = w.base.of(R, False).store(R)[0]
            assert all(torch.equal(a, b) for a, b in zip(w.base, steps, strict=True))
        assert model_snapshot(model) == before
        assert max(errors(model, state).values()) < (0.01 if kind == "int8" else 0.1)

    @EVERY_KIND
    def test_only_adapted_weights_are_quantised_also_those_of_rank_0(self, kind):
        model = two_layers()
        ranks = {"0": 2, "*": 0}
        state = rosa_func.init(model, ranks, quantize=kind, sampler=samplers.lora)
        weights = read(state).adapted()
        assert set(weights) == {"0.weight", "2.weight"}
        assert state["trainable", "2.weight", "A"].shape == (8, 0)
        y = rosa_func.call(model, state, randn(3, 6))
        W = {name: w.base.dense() for name, w in weights.items()}
        assert relative_distance(y, torch.func.functional_call(model, W, (randn(3, 6),))) <= 1e-6
        state = rosa_func.init(model, 2, quantize=kind, exclude="2")
        assert torch.equal(state["frozen", "2.weight"], model[2].weight)

    def test_a_folder_gives_the_same_state(self, tmp_path):
        model = seeded(tiny_gpt2)
        model.save_pretrained(tmp_path)
        options: dict[str, Any] = {"quantize": "nf4", "master": True}
        _, state = rosa_func.init_from(tmp_path, 2, **options)
        assert state_bytes(state) == state_bytes(rosa_func.init(model, 2, **options))
        method = rosa_func.method(2, **options)
        assert state_bytes(state) == state_bytes(method.init(model))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_the_bytes_of_a_residual(self, dtype):
        """Scales counted: 0.28 of bfloat16's for nf4, 0.26 if they are quantised again."""
        model = seeded(lambda: nn.Linear(512, 768, bias=False)).to(dtype)
        for kind, most in (("nf4", 0.2813), ("nf4_double", 0.2585), ("int8", 0.5313)):
            state = state_of(model, kind)
            size = sum(t.nbytes for t in entries(state.select("frozen")).values())
            assert size <= most * 2 * 768 * 512

    @EVERY_KIND
    def test_a_plan_counts_its_bytes(self, kind):
        model = layers()
        options: dict[str, Any] = {"quantize": kind, "master": True}
        state = rosa_func.init(model, 3, **options)
        needs = rosa_func.plan(
            model, 3, loss=lambda model, s: rosa_func.call(model, s, META).sum(), **options
        )
        sizes = {branch: 0 for branch in ("frozen", "compensation")}
        for path, tensor in entries(state).items():
            if path[0] in sizes:
                sizes[path[0]] += tensor.nbytes
        dims = sum(dim.nbytes for dim in state["input_dim"].values())
        assert needs.frozen == sizes["frozen"] + dims
        assert needs.compensation == sizes["compensation"]
        assert needs.peak > needs.frozen + needs.compensation


META = torch.empty(8, 64, device="meta")


class TestPlainTensors:
    @EVERY_KIND
    def test_nothing_of_the_weights_size_stands_for_its_shape(self, kind, tmp_path: Path):
        model, x = layers(), randn(2, 64)
        state = perturbed(state_of(model, kind))
        y = rosa_func.call(model, state, x)
        mapped = state.clone().memmap(tmp_path / "memmap")
        checkpoint.save(tmp_path / "state.safetensors", state)
        loaded, _ = checkpoint.load(tmp_path / "state.safetensors")
        stacked = torch.stack([state, state])[1]
        for other in (
            copy.deepcopy(state),
            mapped,
            loaded,
            stacked,
            state.to("cpu"),
            state.clone(),
        ):
            assert torch.equal(rosa_func.call(model, other, x), y)
            for path, tensor in entries(other).items():
                if path[-1] == "like":
                    assert not tensor.untyped_storage().nbytes() or other is mapped
                    assert not tensor.numel()

    @EVERY_KIND
    def test_a_state_cast_as_a_whole_computes_in_that_dtype(self, kind):
        model = layers()
        state = perturbed(state_of(model, kind))
        merged = rosa_func.merge(state.to(torch.bfloat16))
        for name, W in rosa_func.merge(state).items():
            assert merged[name].dtype == torch.bfloat16
            assert relative_distance(merged[name].float(), W) <= 0.02
        module = RosaModule(model, state).bfloat16()
        assert module(randn(2, 64).bfloat16()).dtype == torch.bfloat16
        assert not module.state["frozen", "0.weight"][
            "int8" if kind == "int8" else "nf4"
        ].is_floating_point()

    @EVERY_KIND
    def test_states_that_are_stacked_are_called_by_vmap(self, kind):
        model, x = layers(), randn(2, 64)
        states = [perturbed(state_of(model, kind, key=key), seed=key) for key in range(3)]
        together = torch.func.vmap(lambda state: rosa_func.call(model, state, x))(
            torch.stack(states)
        )
        for y, state in zip(together, states, strict=True):
            assert relative_distance(y, rosa_func.call(model, state, x)) <= 1e-5
        merged = rosa_func.merge(torch.stack(states))["0.weight"]
        for W, state in zip(merged, states, strict=True):
            assert relative_distance(W, rosa_func.merge(state)["0.weight"]) <= 1e-6


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)), randn(5, 64)),
    "Conv1D": (lambda: nn.Sequential(Conv1D(128, 64), Conv1D(64, 128)), randn(5, 64)),
    "conv2d": (lambda: nn.Conv2d(8, 64, 3), randn(1, 8, 4, 4)),
    "experts": (lambda: ExpertsInOneProduct(64, 32), randn(3, 2, 64)),
    "embedding": (lambda: nn.Embedding(100, 64), torch.tensor([3, 8])),
}


class TestMemory:
    """A dense residual was kept for backward by each layer under autocast and torch.func.grad."""

    @staticmethod
    def largest(model: nn.Module, kept: list[Tensor]) -> tuple[int, int]:
        weight = next(p for p in model.parameters() if p.ndim > 1)
        return max(t.nbytes for t in kept), weight.numel() * 2

    @pytest.mark.parametrize("terms", ["low rank", "sparse"])
    @pytest.mark.parametrize("model", MODELS)
    @EVERY_KIND
    def test_nothing_dense_is_kept_for_backward(self, kind, model, terms):
        build, x = MODELS[model]
        module = seeded(build)
        state = adapt_every_weight(module, 2, quantize=kind)
        if terms == "sparse":
            state = sparse.add(state, sparse.support_random(state, 0.01, key=0))
        state = perturbed(state)
        rosa_func.parameters(state)
        x = x.detach().requires_grad_() if x.is_floating_point() else x
        with saved() as kept:
            rosa_func.call(module, state, x)
        found, dense = self.largest(module, kept)
        assert found <= dense * (0.6 if kind == "int8" else 0.3)

    @pytest.mark.parametrize("model", ["linear", "Conv1D"])
    def test_nor_under_autocast(self, model):
        build, x = MODELS[model]
        module = seeded(build)
        state = perturbed(adapt_every_weight(module, 2, quantize="nf4"))
        leaves = rosa_func.parameters(state)
        with torch.autocast("cpu", torch.bfloat16), saved() as kept:
            y = rosa_func.call(module, state, x.detach().requires_grad_())
        with torch.autocast("cpu", torch.bfloat16):
            expected = torch.func.functional_call(module, dense_weights(state), (x,))
        found, dense = self.largest(module, kept)
        assert found <= 0.3 * dense
        assert y.dtype == torch.bfloat16
        assert relative_distance(y, expected) <= 10 * torch.finfo(torch.bfloat16).eps
        y.float().square().sum().backward()
        assert all(leaf.grad.isfinite().all() and leaf.grad.any() for leaf in leaves)

    def test_nor_by_a_transform(self, monkeypatch):
        """A transform keeps no dense residual either: one lives at a time."""
        build, x = MODELS["linear"]
        module, alive = seeded(build), []
        state = adapt_every_weight(module, 2, quantize="nf4")
        form = Nf4.dense

        def watched(base: Nf4) -> Tensor:
            R = form(base)
            alive.append(weakref.ref(_torch.memory_of(R).untyped_storage()))
            return R

        monkeypatch.setattr(Nf4, "dense", watched)

        def loss(trainable: TensorDict) -> Tensor:
            y = rosa_func.call(module, state.replace(trainable=trainable), x)
            seen.append([storage() is not None for storage in alive])
            return y.square().sum()

        seen: list[list[bool]] = []
        torch.func.grad(loss)(state["trainable"])
        assert seen == [[False, False]] and len(alive) == 3  # and again for the second layer's x


class TestMaster:
    @EVERY_KIND
    def test_ten_resamples_take_what_one_quantisation_takes(self, kind):
        """Without a master, the error of nf4 grew as the square root of the draws: 3.2 times."""
        model = layers()
        state = state_of(model, kind, master=True)
        start = errors(model, state)
        for key in range(10):
            state = rosa_func.resample(state, key)
        for name, error in errors(model, state).items():
            assert error <= 1.05 * start[name]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @EVERY_KIND
    def test_an_exact_master_returns_the_weights_bit_for_bit(self, kind, dtype):
        model = layers().to(dtype)
        state = state_of(model, kind, master=True, exact=True)
        merged = quantised.merge_into_master(rosa_func.resample(state, 1))
        for name, p in model.named_parameters():
            assert torch.equal(merged.weights[name], p)

    def test_a_master_of_16_bits_keeps_small_changes(self):
        """Of 50 changes of 1e-5 of W, bfloat16 kept 93%."""
        model = nn.Linear(128, 96, bias=False)
        model.load_state_dict({"weight": 1e-3 * randn(96, 128)})
        W = model.weight.detach().double()
        state, intended = state_of(model, master=True, key=1), torch.zeros_like(W)
        direction = randn(96, 128, seed=1)
        for key in range(50):
            A, B = (state["trainable", "weight", factor] for factor in "AB")
            dB = torch.linalg.pinv(A) @ direction
            dB *= 1e-5 * W.norm() / (A @ dB).norm()
            intended += A.double() @ ((B + dB).double() - B.double())
            B += dB
            state = rosa_func.resample(state, key)
        change = quantised.merge_into_master(state).weights["weight"].double() - W
        assert abs(float((change * intended).sum() / intended.square().sum()) - 1) <= 0.02

    @pytest.mark.parametrize("size", [1e-6, 1e5])
    def test_a_master_of_unusual_values_is_in_bfloat16(self, size):
        """In float16 those of 1e-6 were off by a third, those of 1e5 infinite."""
        model = nn.Linear(64, 64, bias=False)
        model.load_state_dict({"weight": size * randn(64, 64)})
        state = state_of(model, master=True)
        assert state["compensation", "weight"].dtype == torch.bfloat16
        merged = quantised.merge_into_master(state).weights["weight"]
        assert distance(merged, model.weight.detach()) <= 1e-3

    @EVERY_KIND
    def test_a_master_in_a_folder_stays_there(self, kind, tmp_path):
        model = layers()
        state = state_of(model, kind, master=tmp_path)
        beside = state_of(model, kind, master=True)
        for key in range(2):
            weights = read(state).adapted()
            assert {kept_as(w).place for w in weights.values()} == {str(tmp_path)}
            assert state_bytes(state) == state_bytes(beside)
            state, beside = (rosa_func.resample(s, key) for s in (state, beside))
        module = RosaModule(model, state)
        module.resample(3)
        assert state_bytes(module.state.detach()) == state_bytes(rosa_func.resample(beside, 3))
        assert kept_as(read(module.state).adapted()["0.weight"]).place == str(tmp_path)

    @pytest.mark.parametrize("master", [None, True])
    @EVERY_KIND
    def test_a_donated_state_gives_the_same_bits(self, kind, master):
        model = layers()
        sampler = samplers.random if master else samplers.additive
        state, same = (perturbed(state_of(model, kind, master=master)) for _ in range(2))
        for key in range(2):
            pure = rosa_func.resample(same, key, sampler=sampler)
            state = rosa_func.resample(state, key, sampler=sampler, donate=True)
            assert state_bytes(state) == state_bytes(pure)
            same = pure

    def test_a_donated_model_is_emptied(self):
        model, same = layers(), layers()
        state = rosa_func.init(model, 3, quantize="nf4", donate=True)
        assert state_bytes(state) == state_bytes(state_of(same))
        with pytest.raises(ValueError, match="donated to init"):
            model[0].weight.sum()

    def test_a_resample_without_one_is_refused_where_it_would_quantise_again(self):
        state = state_of(two_layers())
        before = state_bytes(state)
        for sampler in (samplers.random, samplers.top, samplers.bottom, samplers.projection):
            with pytest.raises(
                ValueError, match=rf"0.weight is quantised without a master, and {sampler.__name__}"
            ):
                rosa_func.resample(state, 1, sampler=sampler)
        assert state_bytes(state) == before

    def test_options_that_do_not_go_together(self):
        model = two_layers()
        for options, error, match in (
            ({"quantize": "fp4"}, ValueError, r"'nf4', 'nf4_double', 'int8', or None; got 'fp4'"),
            ({"quantize": True}, TypeError, "such as 'nf4', or None; got True"),
            ({"master": True}, ValueError, "pass quantize as well"),
            ({"quantize": "nf4", "master": 3}, TypeError, "'cpu' or a folder, got 3"),
            ({"quantize": "nf4", "exact": True}, ValueError, "master=True"),
            ({"quantize": "nf4", "compensation": "cpu"}, ValueError, "takes pass master='cpu'"),
            ({"quantize": "nf4", "master": "/no/such/folder"}, OSError, "/no/such/folder"),
        ):
            before = model_snapshot(model)
            with pytest.raises(error, match=match):
                rosa_func.init(model, 2, **options)
            assert model_snapshot(model) == before

    def test_a_weight_beyond_the_range_of_scales_is_named(self):
        model = nn.Linear(64, 4).double()
        with torch.no_grad():
            model.weight[0, 0] = 1e300
        with pytest.raises(ValueError, match=r"residual of weight is beyond .*float32"):
            state_of(model, sampler=samplers.lora)


class TestPast:
    @pytest.mark.parametrize("sampler", BESIDE)
    @EVERY_KIND
    def test_the_codes_stay_and_the_function_too(self, kind, sampler):
        model, x = layers(), randn(3, 64)
        state = perturbed(state_of(model, kind, sampler=samplers.random))
        state = sparse.add(state, sparse.support_random(state, 0.02, key=0))
        for key in range(3):
            state = perturbed(state, seed=key)
            new = rosa_func.resample(state, key, sampler=sampler)
            old = rosa_func.call(model, state, x)
            assert relative_distance(rosa_func.call(model, new, x), old) <= 1e-5
            for path, tensor in entries(state.select("frozen")).items():
                assert torch.equal(tensor, new[path])
            assert torch.equal(
                new["trainable", "0.weight", "values"], state["trainable", "0.weight", "values"]
            )
            A = state["trainable", "0.weight", "A"]
            assert torch.equal(new["fixed", "0.weight", "past_A"][:, 3 * key :], A)
            state = new
        for name, W in rosa_func.merge(state).items():
            assert relative_distance(W, dense_weights(state)[name]) <= 1e-6
        leaves = rosa_func.named_parameters(state)
        assert {name.rpartition(".")[2] for name in leaves} == {"A", "B", "values"}
        assert rosa_func.count(state).trainable == sum(leaf.numel() for leaf in leaves.values())

    def test_what_was_not_trained_adds_nothing(self):
        state = state_of(two_layers(), sampler=samplers.additive)
        new = rosa_func.resample(state, 1, sampler=samplers.additive)
        assert "fixed" not in new.keys()

    def test_a_new_state_shares_nothing_that_trains(self):
        state = state_of(two_layers(), sampler=samplers.additive)
        state = sparse.add(state, sparse.support_random(state, 0.1, key=0))
        new = rosa_func.resample(state, 1, sampler=samplers.additive)
        old = {leaf.data_ptr() for leaf in rosa_func.parameters(state)}
        assert not old & {leaf.data_ptr() for leaf in rosa_func.parameters(new)}

    def test_gradients_and_transforms_are_those_of_the_dense_weights(self):
        model, x = layers(), randn(3, 64)
        state = perturbed(state_of(model))
        state = perturbed(rosa_func.resample(state, 1, sampler=samplers.additive))
        leaves = rosa_func.parameters(state)
        rosa_func.call(model, state, x).square().sum().backward()
        expected = torch.func.functional_call(model, dense_weights(state), (x,))
        plain = torch.autograd.grad(expected.square().sum(), leaves)
        for leaf, gradient in zip(leaves, plain, strict=True):
            assert relative_distance(leaf.grad, gradient) <= 1e-3
        state = state.detach()
        found = torch.func.grad(
            lambda t: rosa_func.call(model, state.replace(trainable=t), x).square().sum()
        )(state["trainable"])
        assert relative_distance(found["0.weight", "A"], leaves[0].grad) <= 1e-4

    @pytest.mark.filterwarnings("ignore:.*forms a batch")
    @pytest.mark.parametrize("name", MODELS)
    def test_every_kind_of_layer_goes_on(self, name):
        build, x = MODELS[name]
        model = seeded(build).bfloat16()
        x = x.detach().bfloat16() if x.is_floating_point() else x
        state = perturbed(adapt_every_weight(model, 2, quantize="nf4"))
        state = perturbed(rosa_func.resample(state, 1, sampler=samplers.additive))
        expected = torch.func.functional_call(model, dense_weights(state), (x,))
        assert relative_distance(rosa_func.call(model, state, x), expected) <= 0.03

    def test_a_module_goes_on_and_its_state_dict_is_loaded(self, tmp_path):
        model, x = two_layers(), randn(3, 6)
        module = RosaModule(model, perturbed(state_of(model)))
        own = list(module.parameters())
        optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
        for key in range(2):
            module(x).square().sum().backward()
            optimizer.step()
            y = module(x)
            module.resample(key, sampler=samplers.additive, optimizer=optimizer)
            assert relative_distance(module(x), y) <= 1e-5
        assert all(a is b for a, b in zip(module.parameters(), own, strict=True))
        assert module.state["fixed", "0.weight", "past_A"].shape == (4, 6)
        fresh = RosaModule(model, state_of(model))
        fresh.load_state_dict(module.state_dict())
        assert state_bytes(fresh.state.detach()) == state_bytes(module.state.detach())
        module.load_state_dict(RosaModule(model, state_of(model)).state_dict())
        assert "fixed" not in module.state.keys()
        with pytest.raises(ValueError, match="differs: make a RosaModule"):
            module.state = state_of(model, "int8")
        checkpoint.save(tmp_path / "run.safetensors", fresh.state)
        loaded, _ = checkpoint.load(tmp_path / "run.safetensors")
        assert state_bytes(loaded) == state_bytes(fresh.state.detach())

    @pytest.mark.usefixtures("few_objects")
    def test_a_module_that_is_interrupted_is_as_it_was(self, monkeypatch):
        """Its factors were the new ones, and what they had trained was gone."""
        model, x = two_layers(), randn(3, 6)
        start = perturbed(rosa_func.resample(perturbed(state_of(model)), 1, sampler=BESIDE[0]))
        table, follow = RosaModule._table, RosaModule._follow_past
        for place in range(0, 40, 8):
            module, calls = RosaModule(model, start), []

            def begins(module: RosaModule, given: Any, calls=calls) -> None:
                calls.append("begun")
                follow(module, given)

            def counted(module: RosaModule, path: Any, calls=calls, place=place) -> Any:
                calls += ["call"] if calls else []
                if len(calls) == place:
                    raise KeyboardInterrupt
                return table(module, path)

            before = state_bytes(module.state.detach())
            with monkeypatch.context() as patch:
                patch.setattr(RosaModule, "_follow_past", begins)
                patch.setattr(RosaModule, "_table", counted)
                with suppress(KeyboardInterrupt):
                    module.resample(2, sampler=BESIDE[0])
            if "begun" in calls and len(calls) > place > 0:
                assert state_bytes(module.state.detach()) == before, place
                interrupted = place
            y = rosa_func.call(model, start, x)
            assert relative_distance(module(x), y) <= 1e-5
        assert interrupted > 20


class TestMerges:
    @EVERY_KIND
    def test_both_merges_and_their_errors(self, kind):
        model = layers()
        state = perturbed(state_of(model, kind, master=True))
        trained, whole = (
            quantised.merge_into_dequantised(state),
            quantised.merge_into_master(state),
        )
        for name, W in rosa_func.merge(state).items():
            assert torch.equal(trained.weights[name], W)
        assert set(whole.errors) == set(trained.errors) == {"0.weight", "2.weight"}
        for name, error in whole.errors.items():
            expected = distance(trained.weights[name], whole.weights[name])
            assert abs(error - expected) <= 1e-6 and trained.errors[name] <= 1e-7
            A, B = (state["trainable", name, factor] for factor in "AB")
            start = state_of(model, kind, master=True)["trainable", name]
            change = A @ B - start["A"] @ start["B"]
            W = dict(model.named_parameters())[name].detach()
            assert distance(whole.weights[name], W + change) <= 1e-4

    def test_what_cannot_be_merged_is_named(self):
        model = two_layers()
        with pytest.raises(ValueError, match="no residual of the state is quantised"):
            quantised.merge_into_dequantised(rosa_func.init(model, 2))
        with pytest.raises(ValueError, match=r"0.weight is quantised without a master"):
            quantised.merge_into_master(state_of(model))

    def test_a_plain_module_and_adapters_have_what_was_trained(self, tmp_path):
        model, x = layers(), randn(3, 64)
        start = state_of(model, sampler=samplers.lora)
        state = perturbed(start)
        y = rosa_func.call(model, state, x)
        assert relative_distance(export.to_module(model, state)(x), y) <= 1e-5
        weights = checkpoint.apply_delta(model, checkpoint.delta(state, model))
        for name, W in rosa_func.merge(state).items():
            assert relative_distance(weights[name], W) <= 1e-6
        # Against the dequantised model the change is that of the factors alone.
        base = export.to_module(model, start)
        change = checkpoint.delta(state, base)
        assert {pair["A"].shape[1] for pair in change["change"].values()} == {3}
        assert max(export.to_peft(tmp_path, base, state).values()) <= 1e-6


class TestSparseParts:
    @EVERY_KIND
    def test_a_master_takes_a_sparse_part_in(self, kind):
        model = layers()
        state = state_of(model, kind, master=True)
        state = perturbed(sparse.add(state, sparse.support_random(state, 0.05, key=0)))
        before = quantised.merge_into_master(state).weights
        for new in (sparse.remove(state), rosa_func.resample(state, 1)):
            merged = quantised.merge_into_master(new)
            for name in merged.errors:
                assert distance(merged.weights[name], before[name]) <= 1e-4

    def test_without_one_it_stays_where_it_is(self):
        state = state_of(two_layers())
        state = sparse.add(state, sparse.support_random(state, 0.2, key=0))
        assert list(rosa_func.named_parameters(sparse.remove(state))) == list(
            rosa_func.named_parameters(state_of(two_layers()))
        )
        with pytest.raises(
            ValueError, match=r"0.weight is quantised without a master, so its sparse"
        ):
            sparse.remove(perturbed(state))

    def test_scores_are_those_of_the_dequantised_weights(self):
        model, batches = two_layers(), [randn(3, 6, seed=seed) for seed in range(2)]

        def loss(model: nn.Module, x: Tensor) -> Tensor:
            return model(x).square().mean()

        state = perturbed(state_of(model))
        dense = rosa_func.init(export.to_module(model, state), 3, sampler=samplers.lora)
        found, expected = (sparse.scores(model, s, batches, loss) for s in (state, dense))
        for name, score in expected.items():
            assert relative_distance(found[name], score) <= 1e-5


class TestRuns:
    @pytest.mark.parametrize("master", [None, True])
    @EVERY_KIND
    def test_a_run_resumes_bit_for_bit(self, kind, master, tmp_path):
        model = seeded(tiny_gpt2)
        sampler = samplers.random if master else samplers.additive
        ids = token_ids(2, 6)

        def train(state: TensorDict, steps: range) -> TensorDict:
            for step in steps:
                new = rosa_func.resample(state, step, sampler=sampler)
                leaves = rosa_func.parameters(new)
                rosa_func.call(model, new, ids, labels=ids, use_cache=False).loss.backward()
                with torch.no_grad():
                    for leaf in leaves:
                        leaf -= 0.1 * leaf.grad
                        leaf.grad = None
                state = new.detach()
            return state

        start = state_of(model, kind, master=master)
        half = train(start, range(2))
        checkpoint.save(tmp_path / "run.safetensors", half)
        loaded, _ = checkpoint.load(tmp_path / "run.safetensors")
        assert state_bytes(train(loaded, range(2, 4))) == state_bytes(train(start, range(4)))
