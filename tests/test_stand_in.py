"""What a RosaModule gives of its model: parts and methods, changes refused, merged when saved."""

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel

import rosa_func
from models import Streaming, gpt2_and_rosa_module, randn, seeded, stock_model, tiny_gpt2, token_ids
from references import model_snapshot, perturbed, relative_distance, state_bytes
from rosa_func.module import RosaModule

# Sums of some tens of float32 products, in another order, through two layers.
CLOSE = 1e-5


def trained() -> tuple[nn.Module, RosaModule, Any]:
    """Return a model, a module that computes otherwise, and its merged model."""
    model = seeded(tiny_gpt2).eval()
    state = perturbed(rosa_func.init(model, 2, targets=["wte", "c_attn"], train="ln_f"))
    return model, RosaModule(model, state), rosa_func.export.to_module(model, state)


class TestParts:
    """`lm_head(x)` was uninitialised memory, embeddings on device meta, `model(ids)` an error."""

    @pytest.mark.parametrize(
        "compute",
        [
            lambda m, ids, x: m.lm_head(x),
            lambda m, ids, x: m.get_input_embeddings()(ids),
            lambda m, ids, x: m.get_output_embeddings().weight @ x[0],
            lambda m, ids, x: m.transformer(ids)[0],
            lambda m, ids, x: m.base_model.h[1].attn.c_attn(x),
            lambda m, ids, x: m.get_submodule("transformer.ln_f")(x),
            lambda m, ids, x: m.get_parameter_or_buffer("transformer.ln_f.weight") * x,
        ],
    )
    def test_a_submodule_and_what_a_method_returns_compute_with_the_state(self, compute: Any):
        model, module, merged = trained()
        ids, x = token_ids(2, 8), randn(3, 12)
        result, expected = compute(module, ids, x), compute(merged, ids, x)
        assert relative_distance(result, expected) <= CLOSE
        assert relative_distance(expected, compute(model, ids, x)) > 100 * CLOSE

    def test_gradients_reach_the_parameters_through_a_submodule(self):
        _, module = gpt2_and_rosa_module()
        ids = token_ids(2, 8)
        found = []
        for logits in (
            lambda: module(ids).logits,
            lambda: module.lm_head(module.transformer(ids).last_hidden_state),
        ):
            module.zero_grad()
            logits().square().mean().backward()
            found.append([p.grad.clone() for p in module.parameters()])
        assert all(g.any() and torch.equal(g, other) for g, other in zip(*found, strict=True))

    def test_the_parts_of_a_sequence_are_found_by_their_place(self):
        model, x = seeded(lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))), randn(2, 6)
        module = RosaModule(model, perturbed(rosa_func.init(model, 2)))
        assert len(module) == 2
        last = x
        for layer in module:
            last = layer(last)
        assert torch.equal(last, module(x))
        assert torch.equal(module[1](module[0](x)), last)

    def test_a_generator_computes_with_the_state(self):
        """It ran on the weightless skeleton."""
        model, x = seeded(lambda: Streaming(nn.Linear(6, 4), nn.Linear(4, 3))), randn(2, 6)
        module = RosaModule(model, perturbed(rosa_func.init(model, 2)))
        assert torch.equal(list(module.stream(x))[-1], module(x))
        model.holder = SimpleNamespace(part=model[0])  # so that it cannot be copied
        module = RosaModule(model, module.state)
        with pytest.raises(TypeError, match="use bind"):
            module.stream(x)

    def test_a_method_that_was_fetched_earlier_computes_with_the_state_of_now(self):
        _, module, _ = trained()
        module = module.bfloat16()  # factors are cast when weights are composed
        ids = token_ids(1, 3)
        generate = module.generate
        options: Any = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
        options |= {"do_sample": False, "max_new_tokens": 3, "output_logits": True}
        options |= {"return_dict_in_generate": True}
        before = generate(ids, **options).logits[0]
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(2.0)
        logits = generate(ids, **options).logits[0]
        assert torch.equal(logits, module.generate(ids, **options).logits[0])
        assert not torch.equal(logits, before)

    def test_a_model_that_cannot_be_copied_keeps_its_methods_and_refuses_its_parts(self):
        model = seeded(tiny_gpt2).eval()
        model.holder = SimpleNamespace(part=model.lm_head)
        module = RosaModule(model, perturbed(rosa_func.init(model, 2, targets="c_attn")))
        merged = rosa_func.export.to_module(model, module.state)
        ids = token_ids(1, 3)
        options: Any = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
        options |= {"do_sample": False, "max_new_tokens": 3}
        assert torch.equal(module.generate(ids, **options), merged.generate(ids, **options))
        assert module.config.n_embd == 12
        assert module.device == torch.device("cpu")
        with pytest.raises(TypeError, match="use bind"):
            module.lm_head  # noqa: B018
        assert not hasattr(module, "hf_device_map")


class TestClass:
    def test_the_class_has_the_name_and_the_signature_of_the_models(self):
        """Trainer shifts labels by the name: label smoothing gave 3.553, stock 3.434."""
        model, module = gpt2_and_rosa_module()
        assert module._get_name() == type(module).__name__ == "GPT2LMHeadModel"
        assert inspect.signature(type(module).forward) == inspect.signature(type(model).forward)
        assert inspect.signature(module.generate) == inspect.signature(model.generate)
        assert isinstance(module, RosaModule)
        assert repr(module) == f"RosaModule({model!r})"

    def test_what_is_set_is_seen_by_the_model(self):
        model, module = gpt2_and_rosa_module()
        config = model.generation_config
        module.generation_config = type(config)(max_new_tokens=2, pad_token_id=0, eos_token_id=30)
        ids = token_ids(1, 3)
        assert module.eval().generate(ids, attention_mask=ids > 0).shape == (1, 5)
        assert model.generation_config is config
        module.note = "mine"
        assert module.note == "mine"
        assert not hasattr(module.skeleton, "note")


class TestChanges:
    """`resize_token_embeddings(60)` was an AttributeError, and the module broken afterwards."""

    @pytest.mark.parametrize(
        ("name", "args"),
        [
            ("resize_token_embeddings", (60,)),
            ("tie_weights", ()),
            ("init_weights", ()),
            ("add_adapter", (None,)),
            ("load_adapter", ("folder",)),
            ("set_input_embeddings", (nn.Embedding(3, 12),)),
            ("dequantize", ()),
            ("apply", (print,)),
        ],
    )
    def test_a_method_that_changes_the_model_is_refused_before_anything_is_touched(
        self, name: str, args: Any
    ):
        model, module = gpt2_and_rosa_module()
        before, bits = model_snapshot(model), state_bytes(module.state)
        size, config = module.config.vocab_size, module.config.to_dict()
        logits = module(token_ids(2, 8)).logits
        with pytest.raises(TypeError, match=f"{name} would change the model.*then init"):
            getattr(module, name)(*args)
        assert module.config.vocab_size == size
        assert module.config.to_dict() == config
        assert torch.equal(module(token_ids(2, 8)).logits, logits)
        assert model_snapshot(model) == before
        assert state_bytes(module.state) == bits

    def test_a_part_of_the_model_cannot_be_replaced(self):
        _, module = gpt2_and_rosa_module()
        for value in (nn.Linear(12, 31), nn.Parameter(randn(3))):
            with pytest.raises(TypeError, match="setting lm_head would change the model"):
                module.lm_head = value
        module.extra = nn.Linear(2, 2)  # is no part of it
        assert "extra.weight" in dict(module.named_parameters())

    def test_a_model_without_such_a_method_has_none(self):
        model = seeded(lambda: nn.Sequential(nn.Linear(6, 4)))
        module = RosaModule(model, rosa_func.init(model, 2))
        for name in ("resize_token_embeddings", "save_pretrained", "tie_weights", "config"):
            assert not hasattr(module, name)


class TestSaving:
    @pytest.mark.parametrize("given", [False, True])
    def test_what_is_saved_is_the_merged_model(self, tmp_path: Path, given: bool):
        """Also as accelerate's users do it, who pass the state dict."""
        _, module, merged = trained()
        ids, options = token_ids(2, 8), {}
        if given:
            options["state_dict"] = {k: v.clone() for k, v in module.state_dict().items()}
            module.resample(1)
            with torch.no_grad():
                next(module.parameters()).add_(1.0)
        module.save_pretrained(tmp_path, is_main_process=True, **options)
        loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
        assert torch.equal(loaded(ids).logits, merged(ids).logits)

    @pytest.mark.parametrize("name", ["bert", "t5", "llama"])
    def test_other_models_are_saved_merged_too(self, tmp_path: Path, name: str):
        case = stock_model(name)
        state = perturbed(rosa_func.init(case.model, 2))
        RosaModule(case.model, state).save_pretrained(tmp_path)
        loaded: Any = type(case.model).from_pretrained(tmp_path)
        merged = rosa_func.merge(state)
        found = dict(loaded.named_parameters())
        assert all(torch.equal(found[name], merged[name]) for name in found)
