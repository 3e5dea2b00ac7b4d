"""The Hypothesis profile, tiny stock models, and the references the tests compare with."""

import random
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import Phase, settings
from tensordict import TensorDict
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

# Derandomized: the same examples in every run, so that a failure is a change of the code. Without
# the phase that explains failures, which takes minutes.
_PHASES = (Phase.explicit, Phase.generate, Phase.shrink)
settings.register_profile(
    "rosa_func", deadline=None, derandomize=True, max_examples=10, phases=_PHASES
)
settings.load_profile("rosa_func")

VOCABULARY = 31
_SPECIAL: Any = {"bos_token_id": 0, "eos_token_id": 0}
# Weights far larger than at a usual start: attention is not uniform, nor activations linear.
_SCALE: Any = {"initializer_range": 0.3}
_ENCODER: Any = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    **_SCALE,
}


class Case(NamedTuple):
    """A model and the arguments of one call of it."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def stock(self) -> Tensor:
        """Return the model's own output."""
        return output(self.model(*self.args, **self.kwargs))


def output(result: Any) -> Tensor:
    """Return the tensor that counts: the logits or hidden states of a transformers output."""
    return result if isinstance(result, Tensor) else result[0]


def seeded(build: Callable[[], Any], seed: int = 0) -> Any:
    """Build with a seeded global generator, and leave that generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw a tensor from a seed of its own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def token_ids(*shape: int, seed: int = 0) -> Tensor:
    """Draw token ids; from 2 on, since 0 and 1 mean padding to some of the models."""
    return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def gpt2(heads: int = 3, layers: int = 2, dropout: float = 0.0, **options: Any) -> GPT2LMHeadModel:
    """Build a GPT-2 whose head has 4 dimensions in place of 64; width, MLP and ties as they are."""
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    shape = {"n_embd": 4 * heads, "n_head": heads, "n_layer": layers, "n_positions": 8}
    options = {"vocab_size": VOCABULARY, **shape, **rates, **_SPECIAL, **_SCALE, **options}
    return GPT2LMHeadModel(GPT2Config(**options))


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
        T5Config(vocab_size=VOCABULARY, dropout_rate=0.0, **shape, **start)
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
            lambda heads=_HEADS[size], layers=layers: gpt2(heads, layers),
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
NAMES = list(_BUILD)


def stock(name: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Case:
    """Build the stock model of that name, in eval mode, with the arguments of a call."""
    build, args, kwargs = _BUILD[name]
    model = seeded(build).to(dtype).eval()
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(attention)
    args = tuple(x.to(dtype) if x.is_floating_point() else x for x in args)
    return Case(model, args, kwargs)


def dense(state: TensorDict) -> dict[str, Tensor]:
    """Form every weight, R + A B, as the independent reference; autograd goes through it."""
    weights = dict(state["frozen"].items())
    for name, value in state["trainable"].items():
        if isinstance(value, Tensor):
            weights[name] = value
        else:
            product = (value["A"] @ value["B"]).to(weights[name].dtype)
            weights[name] = weights[name] + product.view(weights[name].shape)
    return weights


def perturbed(state: TensorDict, scale: float = 0.1, seed: int = 0) -> TensorDict:
    """Move the trainable leaves a little, as training would: A B is then no part of W."""
    generator = torch.Generator().manual_seed(seed)

    def move(leaf: Tensor) -> Tensor:
        noise = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
        return leaf.detach() + scale * noise

    return state.replace({"trainable": state["trainable"].apply(move)})


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference relative to the largest value of b."""
    return float((a - b).detach().abs().max() / b.detach().abs().max().clamp_min(1e-30))


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor of any dtype."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return all of a model that a function must leave as it was."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {
        "tensors": {
            name: (id(t), t.data_ptr(), t._version, t.requires_grad, t.grad, tensor_bytes(t))
            for name, t in tensors
        },
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            (name, attribute): list(hooks)
            for name, module in model.named_modules()
            for attribute, hooks in vars(module).items()
            if attribute.endswith("_hooks")
        },
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
    }


def state_bytes(state: TensorDict) -> dict[Any, tuple[bool, bytes]]:
    """Return every tensor of a state by its path, byte for byte, and whether it takes gradients."""
    return {
        path: (tensor.requires_grad, tensor_bytes(tensor))
        for path, tensor in state.items(include_nested=True, leaves_only=True)
    }


def global_state() -> tuple[Any, ...]:
    """Return what is global and must not move: generators, threads, flags of torch."""
    generators = (
        tensor_bytes(torch.get_rng_state()),
        random.getstate(),
        str(np.random.get_state()),
    )
    flags = (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype())
    return generators + flags


def storages(tensors: Iterable[Tensor]) -> set[int]:
    """Return where the tensors keep their values."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def aliases(model: nn.Module) -> list[list[str]]:
    """Group the names that stand for the same parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return sorted(groups.values())
