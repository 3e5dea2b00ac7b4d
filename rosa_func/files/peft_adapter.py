"""The files of a peft LoRA adapter, and what its config says of a weight."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from rosa_func.extras import needs
from rosa_func.files import hub

PREFIX = "base_model.model."
_CONFIG, _WEIGHTS, _CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
# What makes an adapter more than W0 + scale lora_B lora_A, where it is set.
_MORE = (
    *("use_dora", "use_qalora", "lora_bias", "layer_replication"),
    *("trainable_token_indices", "alora_invocation_tokens", "arrow_config", "megatron_config"),
)
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change W0


def write_adapter(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], card: str
) -> None:
    """Write the files; the folder is made if need be, and a README.md that is there stays."""
    with needs("checkpoint"):
        from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / _WEIGHTS, {"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps(config, indent=2))
    if not (folder / _CARD).exists():
        (folder / _CARD).write_text(card)


def find_adapter(path: str | os.PathLike[str]) -> Path:
    """Return the folder of an adapter, which may be a repository of the Hub."""
    return hub.folder(path, [_CONFIG, _WEIGHTS], _refuse_missing)


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read config and tensors, and refuse what is more than plain LoRA."""
    with needs("checkpoint"):
        from safetensors.torch import load_file

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


def _refuse_missing(folder: Path) -> None:
    if not (folder / _CONFIG).is_file():
        raise FileNotFoundError(f"there is no {folder / _CONFIG}")
    if not (folder / _WEIGHTS).is_file():
        raise FileNotFoundError(
            f"there is no {folder / _WEIGHTS}; an adapter_model.bin is not read, since a pickle "
            "can run any code: load it with PeftModel.from_pretrained if you trust it, and "
            "save_pretrained writes safetensors"
        )


def rank(config: dict[str, Any], name: str) -> int:
    """Return the rank of the module or parameter of that name."""
    return int(_by_pattern(config.get("rank_pattern"), name, config["r"]))


def scale(config: dict[str, Any], name: str, rank: int) -> float:
    """Return alpha / rank, by the patterns of the config, which match the ends of names."""
    alpha = _by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _by_pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
