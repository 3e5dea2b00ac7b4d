"""A model that computes with a state inside a block, and is itself again after it."""

import pytest
import torch
from torch import nn

import rosa_func
from models import seeded, tiny_gpt2, token_ids
from references import perturbed


class TestBind:
    def test_generate_in_a_bind_uses_the_state_and_restores_the_model(self):
        model = seeded(tiny_gpt2).eval()
        state = perturbed(rosa_func.init(model, 2, targets=["wte", "c_attn", "c_fc"]))
        own = {name: (id(p), p._version) for name, p in model.named_parameters()}
        merged = seeded(tiny_gpt2).eval()
        merged.load_state_dict(rosa_func.merge(state), strict=False)
        ids = token_ids(1, 3)
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        for used in (model, rosa_func.skeleton(model)):
            with rosa_func.bind(used, state) as bound:
                assert bound is used
                written = bound.generate(ids, attention_mask=torch.ones_like(ids), **options)
                logits = bound(ids).logits
            assert torch.equal(logits, rosa_func.call(model, state, ids).logits)
            assert torch.equal(
                written, merged.generate(ids, attention_mask=torch.ones_like(ids), **options)
            )
        assert {name: (id(p), p._version) for name, p in model.named_parameters()} == own
        assert not torch.equal(model(ids).logits, logits)

    def test_an_exception_in_a_bind_restores_the_model(self):
        model = seeded(tiny_gpt2)
        own = [id(p) for p in model.parameters()]
        with (
            pytest.raises(RuntimeError, match="inside"),
            rosa_func.bind(model, rosa_func.init(model, 2)),
        ):
            raise RuntimeError("inside")
        assert [id(p) for p in model.parameters()] == own

    def test_bind_refuses_a_state_of_another_model(self):
        state = rosa_func.init(seeded(tiny_gpt2), 2)
        with (
            pytest.raises(KeyError, match="made from this model"),
            rosa_func.bind(nn.Linear(2, 2), state),
        ):
            pass
