"""RosaModule: its parameters, its signature, its buffers, its state dict, its copies."""

import copy
import inspect
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as torch_checkpoint

import rosa_func
from models import (
    checkpoint_segments,
    gpt2_and_rosa_module,
    randn,
    seeded,
    stock_model,
    tiny_gpt2,
    token_ids,
    two_layers,
)
from references import main_output, model_snapshot, state_bytes, storage_pointers
from rosa_func import samplers
from rosa_func.module import RosaModule
from rosa_func.weight.layout import leaves


class TestModule:
    @pytest.mark.parametrize("name", ["gpt2-small", "llama", "bert", "t5", "sequential"])
    def test_a_rosa_module_computes_what_call_computes(self, name: str):
        case = stock_model(name)
        state = rosa_func.init(case.model, 2)
        module = RosaModule(case.model, state)
        one, other = (
            main_output(result)
            for result in (
                module(*case.args, **case.kwargs),
                rosa_func.call(case.model, state, *case.args, **case.kwargs),
            )
        )
        assert torch.equal(one, other)
        assert inspect.signature(module.forward) == inspect.signature(case.model.forward)

    def test_the_parameters_of_a_rosa_module_are_the_leaves_and_nothing_else(self):
        _, module = gpt2_and_rosa_module()
        named = dict(module.named_parameters())
        expected = {f"trainable.{name}": leaf for name, leaf in leaves(module.state).items()}
        assert named.keys() == expected.keys()
        assert all(named[name] is expected[name] for name in named)
        assert all(p.requires_grad for p in module.parameters())

    @pytest.mark.parametrize("sampler", [samplers.random, samplers.lora])
    def test_a_rosa_module_writes_to_neither_the_model_nor_the_state(self, sampler: Any):
        model = seeded(tiny_gpt2)
        state = rosa_func.init(model, 2, sampler=sampler, train="ln_f")
        before, bits = model_snapshot(model), state_bytes(state)
        module = RosaModule(model, state)
        optimizer = torch.optim.Adam(module.parameters(), 0.1)
        for step in range(3):
            module.resample(step, sampler=sampler, optimizer=optimizer)
            optimizer.zero_grad()
            module(token_ids(2, 8)).logits.square().mean().backward()
            optimizer.step()
        module.load_state_dict({k: torch.zeros_like(v) for k, v in module.state_dict().items()})
        module.to(torch.float64).to(torch.float32)
        assert model_snapshot(model) == before
        assert state_bytes(state) == bits

    def test_the_state_dict_of_a_rosa_module_is_the_whole_state(self):
        _, module = gpt2_and_rosa_module(exact=True)
        paths = module.state.keys(True, True)
        assert set(module.state_dict()) == {".".join(path) for path in paths}
        _, other = gpt2_and_rosa_module(exact=True, key=7)
        other.load_state_dict(module.state_dict())
        assert state_bytes(other.state.detach()) == state_bytes(module.state.detach())
        with pytest.raises(RuntimeError, match="Missing key"):
            other.load_state_dict({})
        partial = {"trainable.transformer.ln_f.bias": torch.ones(12)}
        other.load_state_dict(partial, strict=False)
        before = state_bytes(module.state.detach())
        changed = state_bytes(other.state.detach())
        assert {path for path in before if before[path] != changed[path]} == {
            ("trainable", "transformer.ln_f.bias")
        }

    def test_a_state_dict_is_loaded_where_only_one_of_two_states_lost_something(self):
        """A compensation has no elements until something is rounded off."""
        options = {"sampler": samplers.lora, "exact": True}
        _, fresh = gpt2_and_rosa_module(**options)
        _, trained = gpt2_and_rosa_module(**options)
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(0.1)
        trained.resample(1)
        bits = state_bytes(fresh.state.detach()), state_bytes(trained.state.detach())
        _, other = gpt2_and_rosa_module(**options)
        for module, expected in zip((fresh, trained, fresh), (*bits, bits[0]), strict=True):
            other.load_state_dict(module.state_dict())
            assert state_bytes(other.state.detach()) == expected

    @pytest.mark.parametrize("moments", ["reset", "keep", "project"])
    def test_a_rosa_module_resamples_as_the_functions_do_in_the_same_parameters(self, moments: str):
        model, module = gpt2_and_rosa_module()
        state = rosa_func.init(model, 2, targets=["wte", "c_attn", "c_fc"], train="ln_f")
        own = list(module.parameters())
        one = torch.optim.Adam(module.parameters(), 0.01)
        other = torch.optim.Adam(rosa_func.parameters(state), 0.01)
        calls: list[int] = []
        own[0].register_post_accumulate_grad_hook(lambda _: calls.append(1))
        for step in range(6):
            if step == 3:
                module.resample(step, optimizer=one, moments=moments)
                new = rosa_func.resample(state, step)
                rosa_func.optim.rebind(other, state, new, moments=moments)
                state = new
            for optimizer, logits in (
                (one, module(token_ids(2, 8, seed=step)).logits),
                (other, rosa_func.call(model, state, token_ids(2, 8, seed=step)).logits),
            ):
                optimizer.zero_grad()
                logits.square().mean().backward()
                optimizer.step()
        assert all(a is b for a, b in zip(own, module.parameters(), strict=True))
        assert all(a is b for a, b in zip(own, one.param_groups[0]["params"], strict=True))
        assert len(calls) == 6
        assert state_bytes(module.state.detach()) == state_bytes(state.detach())

    def test_a_rosa_module_has_the_modes_copies_and_methods_of_its_model(self):
        model, module = gpt2_and_rosa_module()
        assert module.config is not None
        assert not module.eval().skeleton.training
        assert module.train().skeleton.training
        ids, module = token_ids(1, 3), module.eval()
        merged = rosa_func.export.to_module(model.eval(), module.state)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
        options["pad_token_id"] = 0
        assert torch.equal(module.generate(ids, **options), merged.generate(ids, **options))
        assert module.device == torch.device("cpu")
        full = RosaModule(model, rosa_func.init(model, targets=(), train="*"))  # without buffers
        assert full.device == torch.device("cpu")
        checkpoint_segments(module.train(), {"use_reentrant": False})
        module(ids).logits.sum().backward()
        checkpoint_segments(module, on=False)
        module = module.eval()
        twin = copy.deepcopy(module)
        with torch.no_grad():
            next(twin.parameters()).add_(1.0)
        assert not torch.equal(twin(ids).logits, module(ids).logits)
        twin.load_state_dict(module.state_dict())
        assert torch.equal(twin(ids).logits, module(ids).logits)
        with pytest.raises(AttributeError, match="nonsense"):
            module.nonsense  # noqa: B018

    def test_moving_a_rosa_module_moves_the_buffers_that_no_state_holds(self):
        case = stock_model("llama")
        module = RosaModule(case.model, rosa_func.init(case.model, 2)).double()
        assert {b.dtype for b in module.skeleton.buffers() if b.is_floating_point()} == {
            torch.float64
        }
        assert module(*case.args, **case.kwargs).logits.dtype == torch.float64


class TestBuffers:
    """BatchNorm kept no statistics under a RosaModule: 0.0, stock 0.97."""

    def stock_and_module(self) -> tuple[nn.Module, nn.Module, Any, RosaModule]:
        build = lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))  # noqa: E731
        stock, model = seeded(build), seeded(build)
        state = rosa_func.init(model, 2)
        return stock, model, state, RosaModule(model, state)

    def test_the_statistics_of_a_forward_pass_in_training_are_kept_in_the_module_alone(self):
        stock, model, state, module = self.stock_and_module()
        before, bits = model_snapshot(model), state_bytes(state)
        for seed in range(3):
            x = randn(50, 6, seed=seed) + 2
            module(x).sum().backward()
            stock(x)
        module.eval()(x)
        stock.eval()(x)
        kept = rosa_func.merge(module.state)
        assert stock[1].running_mean.abs().max() > 0.1
        for name, buffer in stock.named_buffers():
            torch.testing.assert_close(kept[name], buffer)
        torch.testing.assert_close(module(x), stock(x))
        assert model_snapshot(model) == before
        assert state_bytes(state) == bits

    def test_statistics_of_inference_mode_can_be_written_to_afterwards(self):
        stock, _, _, module = self.stock_and_module()
        x = randn(50, 6)
        with torch.inference_mode():
            module(x)
            stock(x)
        module.load_state_dict(module.state_dict())
        torch.testing.assert_close(
            rosa_func.merge(module.state)["1.running_mean"], stock[1].running_mean
        )

    def test_buffers_that_no_state_holds_are_dropped_with_the_attributes_beside_them(self):
        """A rotary embedding that was grown for a long input kept half of what it had set."""

        class Growing(nn.Linear):
            def __init__(self) -> None:
                super().__init__(6, 4)
                self.longest = 2
                self.register_buffer("scale", torch.ones(()), persistent=False)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                if len(x) > self.longest:
                    self.longest = len(x)
                    self.register_buffer("scale", torch.tensor(3.0), persistent=False)
                return super().forward(x) * self.scale

        model = seeded(Growing)
        module, x = RosaModule(model, rosa_func.init(model, 2)), randn(2, 6)
        first = module(x)
        module(randn(5, 6))
        assert torch.equal(module(x), first)
        assert (model.longest, model.scale.item()) == (2, 1.0)


class TestStateDict:
    @pytest.mark.filterwarnings("ignore")  # about torch.distributed.checkpoint without processes
    @pytest.mark.parametrize("sampler", [samplers.random, samplers.lora])
    def test_a_state_dict_that_is_loaded_in_place_writes_to_the_module_alone(
        self, tmp_path: Path, sampler: Any
    ):
        """The caller's state became 0.40 off, and with `lora` the model's weight by 0.27."""
        model = seeded(tiny_gpt2)
        state = rosa_func.init(model, 2, sampler=sampler, train="ln_f")
        before, bits = model_snapshot(model), state_bytes(state)
        module = RosaModule(model, state)
        others = {key: torch.ones_like(value) for key, value in module.state_dict().items()}
        torch_checkpoint.save({"m": others}, checkpoint_id=tmp_path)
        torch_checkpoint.load({"m": module.state_dict()}, checkpoint_id=tmp_path)
        assert all(torch.equal(value, others[key]) for key, value in module.state_dict().items())
        assert model_snapshot(model) == before
        assert state_bytes(state) == bits

    def test_a_state_dict_takes_no_second_copy_of_what_the_module_alone_has(self):
        model, module = gpt2_and_rosa_module()
        before = storage_pointers(module.buffers())
        assert before & storage_pointers(model.parameters())
        module(token_ids(2, 8))
        assert storage_pointers(module.buffers()) == before  # none is copied for its own sake
        first = storage_pointers(module.state_dict().values())
        assert not first & storage_pointers(model.parameters())
        assert storage_pointers(module.state_dict().values()) == first


class TestCopies:
    """A RosaModule could not be pickled: its class had no name to be found by."""

    @pytest.mark.parametrize("how", ["pickle", "torch.save", "deepcopy"])
    def test_a_copy_computes_the_same_and_is_its_own(self, how: str):
        _, module = gpt2_and_rosa_module()
        file, ids = io.BytesIO(), token_ids(2, 8)
        if how == "pickle":
            twin = pickle.loads(pickle.dumps(module))
        elif how == "torch.save":
            torch.save(module, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        else:
            twin = copy.deepcopy(module)
        assert type(twin) is type(module)
        expected = module(ids).logits
        assert torch.equal(twin(ids).logits, expected)
        twin.resample(1)
        with torch.no_grad():
            next(twin.parameters()).add_(1.0)
        assert not torch.equal(twin(ids).logits, expected)
        assert torch.equal(module(ids).logits, expected)
        module.load_state_dict(twin.state_dict())
        assert torch.equal(twin(ids).logits, module(ids).logits)


def test_a_rosa_module_names_what_its_state_lacks():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3)))
    state = rosa_func.init(model, 2)
    del state["frozen", "0.weight"]
    with pytest.raises(KeyError, match=r"frozen residual of 0\.weight"):
        RosaModule(model, state)
    with pytest.raises(KeyError, match="was it made from this model"):
        RosaModule(nn.Linear(4, 3), rosa_func.init(model, 2))


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_or_a_trace_is_refused_by_name_and_leaves_the_module_as_it_was(strict: bool):
    """The module was left with tensors that have no values, for every later call."""
    if not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("this torch does not say when it exports")
    model, x = two_layers(), randn(3, 6)
    module = RosaModule(model, rosa_func.init(model, 2))
    expected = module(x)
    with pytest.raises(Exception, match=r"export\.to_module"):
        torch.export.export(module, (x,), strict=strict)
    assert torch.equal(module(x), expected)
    with pytest.raises(ValueError, match=r"export\.to_module"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(module, (x,))
    assert torch.equal(module(x), expected)
