"""RosaModule: what it computes, its parameters, its signature, its resamples, its refusals."""

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import nn

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
from references import main_output, model_snapshot, state_bytes
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
        warnings.simplefilter("ignore")  # torch, of jit.trace itself
        torch.jit.trace(module, (x,))
    assert torch.equal(module(x), expected)
