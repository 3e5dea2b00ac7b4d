"""What a plan says beside what is: sizes, the peak of a step, the time of a draw."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig

import rosa_func
from cases import DTYPES
from models import token_ids
from rosa_func import _timing, samplers
from rosa_func._alive import Alive
from rosa_func.weight.layout import entries

VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
TINY = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 50, "n_positions": 16}


def gpt2(**options: Any) -> Any:
    from transformers import GPT2LMHeadModel

    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**TINY, **off, bos_token_id=0, eos_token_id=0, **options))


def bytes_of(state: TensorDict, *branches: str) -> int:
    return sum(t.nbytes for path, t in entries(state).items() if path[0] in branches)


class TestSizes:
    @pytest.mark.parametrize("sampler", [samplers.projection, samplers.lora])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("exact", [None, True, False])
    def test_they_are_those_of_the_state(
        self, sampler: samplers.Sampler, dtype: torch.dtype, exact: bool | None
    ):
        model = gpt2().to(dtype)
        options: dict[str, Any] = {"sampler": sampler, "exact": exact, "train": "ln_f"}
        state = rosa_func.init(model, 2, **options)
        plan = rosa_func.plan(model, 2, **options)
        assert plan.frozen == bytes_of(state, "frozen", "input_dim", "model_dtype")
        assert plan.compensation == bytes_of(state, "compensation")
        assert plan.trainable == bytes_of(state, "trainable")
        assert plan.peak == plan.frozen + plan.compensation + plan.trainable

    @pytest.mark.parametrize("quantize", ["nf4", "nf4_double", "int8"])
    @pytest.mark.parametrize("master", [None, True])
    def test_they_are_those_of_a_quantised_state(self, quantize: str, master: bool | None):
        options: dict[str, Any] = {"quantize": quantize, "master": master}
        state = rosa_func.init(gpt2(), 2, **options)
        plan = rosa_func.plan(gpt2(), 2, **options)
        assert plan.frozen == bytes_of(state, "frozen", "input_dim")
        assert plan.compensation == bytes_of(state, "compensation")

    def test_a_config_says_as_much_as_a_model(self):
        model = gpt2()
        assert rosa_func.plan(model.config, 2)[:-1] == rosa_func.plan(model, 2)[:-1]
        half = rosa_func.plan(model.config, 2, dtype=torch.bfloat16)
        assert half[:-1] == rosa_func.plan(gpt2().to(torch.bfloat16), 2)[:-1]

    @pytest.mark.skipif(
        VERSION < (2, 13),
        reason="Llama's autocast(enabled=False) is an error on meta before",
    )
    def test_a_model_of_a_billion_parameters_takes_no_memory(self):
        config = LlamaConfig(num_hidden_layers=8, architectures=["LlamaForCausalLM"])
        plan = rosa_func.plan(config, 16, batch=(1, 2048), dtype=torch.bfloat16)
        shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 3
        assert plan.trainable == 8 * sum(4 * 16 * (m + n) for m, n in shapes)
        weights = 8 * (sum(m * n for m, n in shapes) + 2 * 4096) + 2 * 32000 * 4096 + 4096
        assert plan.frozen == 2 * weights + 8 * 7 * 8  # input_dim: one int64 a weight
        assert plan.peak > plan.frozen + plan.compensation + 4 * plan.trainable


class TestStep:
    def test_the_peak_is_what_is_counted_on_a_cpu(self):
        """The same operations, with values."""
        model, ids = gpt2(attn_implementation="eager"), token_ids(3, 12)
        state = rosa_func.init(model, 2)
        optimizer = torch.optim.AdamW(rosa_func.parameters(state))
        with Alive(entries(state).values()) as alive:
            for _ in range(2):
                optimizer.zero_grad()
                rosa_func.call(model, state, ids, labels=ids, use_cache=False).loss.backward()
                optimizer.step()
        plan = rosa_func.plan(model, 2, batch=(3, 12))
        assert plan.peak == pytest.approx(alive.peak, rel=0.01)

    def test_the_peak_of_a_chain_is_what_a_hand_counts(self):
        """Forward holds x, x A of both layers and their outputs; backward one gradient more."""
        d, tokens, r = 64, 1000, 4
        model = nn.Sequential(nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False))

        def loss(model: nn.Module, state: TensorDict) -> Tensor:
            return rosa_func.call(model, state, torch.ones(tokens, d, device="meta")).sum()

        plan = rosa_func.plan(model, r, loss=loss, optimizer=lambda leaves: torch.optim.SGD(leaves))
        assert plan.gradients == plan.trainable == 2 * 2 * d * r * 4
        assert plan.moments == 0
        rows = tokens * 4
        held = 3 * d * rows + 2 * r * rows  # x, y, z; x A, y A
        assert held <= plan.activations <= held + 2 * d * rows + 2 * r * rows

    def test_layers_that_are_computed_again_are_not_held(self):
        """Attention was computed otherwise when it was computed again: a CheckpointError."""
        model, held = gpt2(), rosa_func.plan(gpt2(), 2, batch=(3, 12)).activations
        named = hasattr(model, "activation_checkpointing_enable")
        switch = f"{'activation' if named else 'gradient'}_checkpointing_enable"
        getattr(model, switch)({"use_reentrant": False, "context_fn": rosa_func.recompute})
        assert rosa_func.plan(model, 2, batch=(3, 12)).activations < 0.8 * held

    def test_moments_are_those_of_the_optimizer(self):
        plan = rosa_func.plan(gpt2(), 2, batch=(1, 4))
        steps = 4 * 2 * 2 * 4  # a float32 count for A and B of 4 weights in 2 layers
        assert plan.moments == 2 * plan.trainable + steps
        assert rosa_func.plan(gpt2(), 2).moments == 0


class TestResampling:
    def test_its_time_grows_with_the_third_power(self, monkeypatch: pytest.MonkeyPatch):
        """A clock that ticks once a look: each draw takes a second."""
        clock = itertools.count()
        monkeypatch.setattr(_timing, "thread_time", lambda: next(clock))
        monkeypatch.setattr(_timing, "_TIMED", 8)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(4, 4))
        assert rosa_func.plan(model, 2).resample == (8 + 8 + 1) / 2
        assert rosa_func.plan(model, 2, ranks=4).resample == (8 + 8 + 1) / 2 / 4


class TestRanks:
    @pytest.mark.parametrize("ranks", [1, 2, 4])
    def test_a_rank_holds_its_share_and_two_weights_gathered(self, ranks: int):
        """By hand: 64 x 32, 128 x 64 and 7 x 128 in 16 bits, and their biases."""
        model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 128), nn.Linear(128, 7)).bfloat16()

        def loss(model: nn.Module, state: TensorDict) -> Tensor:
            x = torch.ones(3, 32, device="meta", dtype=torch.bfloat16)
            return rosa_func.call(model, state, x).sum()

        whole = rosa_func.plan(model, 4, loss=loss)
        plan = rosa_func.plan(model, 4, loss=loss, ranks=ranks)
        shapes = [(64, 32), (128, 64), (7, 128)]
        matrices = [2 * m * n for m, n in shapes]
        share = sum(2 * math.ceil(m / ranks) * n for m, n in shapes)
        vectors = 2 * (64 + 128 + 7) + 3 * 8  # input_dim: one int64 a weight
        assert plan.frozen == share + vectors
        assert plan.compensation == share // 2  # the next eight bits
        assert plan.gathered == (0 if ranks == 1 else 2 * max(matrices))
        alike = ("trainable", "gradients", "moments", "activations")
        assert [getattr(plan, what) for what in alike] == [getattr(whole, what) for what in alike]
        assert plan.peak == sum(plan[: plan._fields.index("peak")])
        received = 2 * sum(matrices) + 2 * plan.gradients
        assert plan.traffic == received * (ranks - 1) // ranks

    def test_codes_and_scales_are_what_is_sharded_and_gathered(self):
        whole = rosa_func.plan(gpt2(), 2, quantize="nf4", master=True, targets="c_fc")
        plan = rosa_func.plan(gpt2(), 2, quantize="nf4", master=True, targets="c_fc", ranks=2)
        assert plan.compensation == whole.compensation / 2
        in_full = 4 * 128 * 32  # of c_proj, the largest matrix, which is not quantised
        assert plan.gathered == 2 * in_full
        codes = rosa_func.plan(nn.Linear(64, 64), 2, quantize="nf4", ranks=2)
        assert codes.gathered == 2 * (64 * 64 // 2 + 64 * 64 // 64 * 4)

    @pytest.mark.parametrize("ranks", [0, -1, 1.0, True, "2"])
    def test_ranks_that_are_none(self, ranks: Any):
        with pytest.raises(ValueError, match="ranks is a positive int, got"):
            rosa_func.plan(gpt2(), 2, ranks=ranks)


class TestRefusals:
    def test_two_ways_to_say_what_a_step_is(self):
        with pytest.raises(ValueError, match="pass one"):
            rosa_func.plan(gpt2(), 2, batch=(1, 4), loss=lambda model, state: torch.ones(()))

    @pytest.mark.parametrize("model", ["gpt2", None, SimpleNamespace()])
    def test_neither_a_model_nor_a_config(self, model: Any):
        with pytest.raises(TypeError, match="a transformers config, got"):
            rosa_func.plan(model, 2)

    def test_a_rank_out_of_range(self):
        with pytest.raises(ValueError, match="rank"):
            rosa_func.plan(gpt2(), 1000)
