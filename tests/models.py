"""Tiny stock models, built by their configuration, and seeded inputs for them."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

import rosa_func
from references import main_output
from rosa_func.module import RosaModule

VOCABULARY_SIZE = 31
_SPECIAL: Any = {"bos_token_id": 0, "eos_token_id": 0}
# Weights far larger than usual at the start: attention is not uniform, activations not linear.
_SCALE: Any = {"initializer_range": 0.3}
_ENCODER: Any = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    **_SCALE,
}


class ModelCall(NamedTuple):
    """A model and the arguments for one call of it."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def own_output(self) -> Tensor:
        """Return what the model computes with its own weights."""
        return main_output(self.model(*self.args, **self.kwargs))


def seeded(build: Callable[[], Any], seed: int = 0) -> Any:
    """Build with the global generator seeded, and leave that generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw a tensor from a seed of its own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def token_ids(*shape: int, seed: int = 0) -> Tensor:
    """Draw token ids from 2 on: 0 and 1 mean padding to some of the models."""
    return torch.randint(2, VOCABULARY_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def tiny_gpt2(
    heads: int = 3, layers: int = 2, dropout: float = 0.0, **options: Any
) -> GPT2LMHeadModel:
    """Build a GPT-2 with 4 dimensions per head instead of 64. All else is as in the stock model."""
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    shape = {"n_embd": 4 * heads, "n_head": heads, "n_layer": layers, "n_positions": 8}
    options = {"vocab_size": VOCABULARY_SIZE, **shape, **rates, **_SPECIAL, **_SCALE, **options}
    return GPT2LMHeadModel(GPT2Config(**options))


def gpt2_and_rosa_module(**options: Any) -> tuple[nn.Module, RosaModule]:
    model = seeded(tiny_gpt2)
    options = {"targets": ["wte", "c_attn", "c_fc"], "train": "ln_f", **options}
    return model, RosaModule(model, rosa_func.init(model, 2, **options))


def checkpoint_segments(model: Any, options: Any = None, on: bool = True) -> None:
    """Switch gradient checkpointing on or off, by the name that this transformers has for it."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{name}_checkpointing_enable")(options)
    else:
        getattr(model, f"{name}_checkpointing_disable")()


def two_layers() -> nn.Sequential:
    """Build a model with the weights 0.weight (4 x 6) and 2.weight (8 x 4)."""
    return seeded(lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 8)))


class Streaming(nn.Sequential):
    """Layers whose outputs are asked for one by one."""

    def stream(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the output of each layer."""
        for layer in self:
            x = layer(x)
            yield x


def _llama() -> nn.Module:
    shape: Any = {"num_key_value_heads": 2, "max_position_embeddings": 8}
    return LlamaForCausalLM(LlamaConfig(**_ENCODER, **shape, **_SPECIAL))


def _opt() -> nn.Module:
    # word_embed_proj_dim differs from hidden_size, so that project_in and project_out exist.
    shape = {**_ENCODER, "ffn_dim": _ENCODER["intermediate_size"], "init_std": 0.3}
    del shape["intermediate_size"], shape["initializer_range"]
    extra: Any = {"word_embed_proj_dim": 8, "max_position_embeddings": 8, "dropout": 0.0}
    return OPTForCausalLM(OPTConfig(**shape, **extra, **_SPECIAL, pad_token_id=1))


def _bert(model: Any, config: Any, **options: Any) -> nn.Module:
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return model(config(**_ENCODER, **rates, max_position_embeddings=10, **options))


def _t5() -> nn.Module:
    shape: Any = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    start: Any = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 0}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY_SIZE, dropout_rate=0.0, **shape, **start)
    )


def _vit() -> nn.Module:
    shape = {name: value for name, value in _ENCODER.items() if name != "vocab_size"}
    return ViTModel(ViTConfig(image_size=8, patch_size=4, **shape), add_pooling_layer=False)


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def _sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 5))


_ids = token_ids(2, 6)
_GPT2_SIZES = {"small": 1, "medium": 2, "large": 3, "xl": 4}
_HEADS = {"small": 12, "medium": 16, "large": 20, "xl": 25}
_BUILD: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], dict[str, Any]]] = {
    # Heads as published, layers in the published proportion of 12 : 24 : 36 : 48.
    **{
        f"gpt2-{size}": (
            lambda heads=_HEADS[size], layers=layers: tiny_gpt2(heads, layers),
            (_ids,),
            {"use_cache": False},
        )
        for size, layers in _GPT2_SIZES.items()
    },
    "llama": (_llama, (_ids,), {"use_cache": False}),
    "opt": (_opt, (_ids,), {"use_cache": False}),
    "bert": (lambda: _bert(BertForMaskedLM, BertConfig), (_ids,), {}),
    "roberta": (
        lambda: _bert(RobertaForMaskedLM, RobertaConfig, pad_token_id=1, **_SPECIAL),
        (_ids,),
        {},
    ),
    "t5": (_t5, (_ids,), {"decoder_input_ids": token_ids(2, 4, seed=1), "use_cache": False}),
    "vit": (_vit, (randn(2, 3, 8, 8),), {}),
    "encoder": (_encoder, (randn(2, 6, 16),), {}),
    "sequential": (_sequential, (randn(7, 12),), {}),
}
STOCK_NAMES = list(_BUILD)


def stock_model(
    name: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> ModelCall:
    """Build the stock model of that name in eval mode, with the arguments for one call."""
    build, args, kwargs = _BUILD[name]
    model = seeded(build).to(dtype).eval()
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(attention)
    args = tuple(x.to(dtype) if x.is_floating_point() else x for x in args)
    return ModelCall(model, args, kwargs)


# Mixtures of experts. All widths are multiples of 8, since a grouped product wants rows of a
# multiple of 16 bytes, also in 16 bits.
_MOE: Any = {
    **_ENCODER,
    **_SPECIAL,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8,
    "num_experts_per_tok": 2,
}


def _mixtral(**options: Any) -> nn.Module:
    config = {**_MOE, "num_local_experts": 4, **options}
    return MixtralForCausalLM(MixtralConfig(**config))


def _qwen2_moe(**options: Any) -> nn.Module:
    # Every layer has experts and a shared expert, whose gate is an nn.Linear of one output.
    shape: Any = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 40}
    config = {**_MOE, "num_experts": 4, **shape, **options}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**config))


def _qwen3_moe(**options: Any) -> nn.Module:
    # Heads of 8 dimensions instead of hidden_size / heads: q is 32 x 16.
    shape: Any = {"moe_intermediate_size": 32, "head_dim": 8}
    config = {**_MOE, "num_experts": 4, **shape, **options}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**config))


def _deepseek_v3(**options: Any) -> nn.Module:
    # The first layer is dense; the second has 4 experts in 2 groups and a shared expert.
    shape: Any = {"moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1}
    shape |= {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 2}
    shape |= {"q_lora_rank": 8, "kv_lora_rank": 8}
    shape |= {"qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
    config = {**_MOE, "num_key_value_heads": 4, **shape, **options}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**config))


def _gpt_oss(**options: Any) -> nn.Module:
    # Experts of (in, out), with biases; the first layer attends to a window, the second to all.
    shape: Any = {"head_dim": 4, "sliding_window": 4, "pad_token_id": None}
    shape |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    config = {**_MOE, "num_local_experts": 4, **shape, **options}
    return GptOssForCausalLM(GptOssConfig(**config))


def _or_skip(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Skip a test of experts where transformers does not keep those of a layer in one weight."""

    def built(**options: Any) -> nn.Module:
        if int(transformers.__version__.partition(".")[0]) < 5:
            pytest.skip("before transformers 5 each expert is a module")
        return build(**options)

    return built


# Each takes further entries of its configuration.
MOE_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "mixtral": _or_skip(_mixtral),
    "qwen2-moe": _or_skip(_qwen2_moe),
    "qwen3-moe": _or_skip(_qwen3_moe),
    "deepseek-v3": _or_skip(_deepseek_v3),
    "gpt-oss": _or_skip(_gpt_oss),
}
MOE_NAMES = list(MOE_BUILDERS)


def stock_moe(
    name: str, implementation: str = "grouped_mm", dtype: torch.dtype = torch.float32
) -> ModelCall:
    """Build the stock mixture of experts of that name in eval mode, with one call's arguments.

    implementation is "eager", "batched_mm" or "grouped_mm" (the default of transformers, which
    has no float64 and no forward derivative).
    """
    options = {"experts_implementation": implementation}
    model = seeded(lambda: MOE_BUILDERS[name](**options)).to(dtype).eval()
    return ModelCall(model, (_ids,), {"use_cache": False})
