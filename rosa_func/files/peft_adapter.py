"""The files of a peft LoRA adapter: what is where, and under which names."""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rosa_func.modules import is_conv1d

Factors = tuple[Tensor, Tensor]

PREFIX = "base_model.model."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What makes an adapter more than W0 + scale lora_B lora_A, where it is set.
_MORE = (
    *("use_dora", "use_qalora", "lora_bias", "layer_replication", "target_parameters"),
    *("trainable_token_indices", "alora_invocation_tokens", "arrow_config", "megatron_config"),
)
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change W0


def write_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write both files; the folder is made if need be."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / _WEIGHTS, {"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps(config, indent=2))


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read both files, and refuse what is more than plain LoRA."""
    from safetensors.torch import load_file

    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"there is no {folder / name}")
    config = json.loads((folder / _CONFIG).read_text())
    more = [f"{option}={config[option]!r}" for option in _MORE if config.get(option)]
    if config.get("peft_type") != "LORA":
        more.append(f"peft_type={config.get('peft_type')!r}")
    if config.get("bias", "none") != "none":
        more.append(f"bias={config['bias']!r}")
    if config.get("init_lora_weights") not in _STARTS:
        more.append(f"init_lora_weights={config['init_lora_weights']!r}")
    if more:
        raise ValueError(
            f"the adapter in {folder} is not plain LoRA: {', '.join(more)}; merge it with peft, "
            "and use init"
        )
    return config, load_file(folder / _WEIGHTS)


def scale(config: dict[str, Any], module: str, rank: int) -> float:
    """Return alpha / rank, by the patterns of the config, which match the ends of names."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def as_lora(module: nn.Module, alias: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """Return A B, in the layout of the weight, as peft stores it for that module."""
    base, _, last = alias.rpartition(".")
    base = PREFIX + base
    if last == "weight" and isinstance(module, nn.Embedding):
        return {f"{base}.lora_embedding_A": A.T, f"{base}.lora_embedding_B": B.T}
    if last == "weight" and is_conv1d(module):
        return {f"{base}.lora_A.weight": A.T, f"{base}.lora_B.weight": B.T}
    if last == "weight" and type(module) is nn.Linear:  # peft ignores adapters of its subclasses
        return {f"{base}.lora_A.weight": B, f"{base}.lora_B.weight": A}
    raise ValueError(
        f"{alias} belongs to {type(module).__name__}: an adapter is of nn.Linear, Conv1D and "
        "nn.Embedding weights; use export.to_module"
    )


def from_lora(module: nn.Module, lora_A: Tensor, lora_B: Tensor, scale: float) -> Factors:
    """Return the factors A, B of the change of the weight, in its layout."""
    if isinstance(module, nn.Embedding) or is_conv1d(module):
        A, B = lora_A.T, lora_B.T
    else:
        A, B = lora_B, lora_A
    root = math.sqrt(abs(scale))
    A, B = A * root, B * math.copysign(root, scale)
    if A.shape[1] <= min(len(A), B.shape[1]):
        return A, B
    U, S, Vh = torch.linalg.svd(A @ B, full_matrices=False)  # more columns than a rank can be
    return U * S.sqrt(), S.sqrt()[:, None] * Vh


def exactly(names: list[str], modules: dict[str, nn.Module]) -> list[str] | str:
    """Return the names, or a pattern where peft, which matches the ends of names, takes more."""
    more = [m for m in modules if m not in names and any(m.endswith(f".{n}") for n in names)]
    return "|".join(map(re.escape, names)) if more else names
