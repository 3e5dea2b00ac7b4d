"""peft LoRA adapters: a change as an adapter, and an adapter as a state."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from rosa_func import samplers
from rosa_func import state as states
from rosa_func import targets as targeting
from rosa_func.change import delta

Factors = tuple[Tensor, Tensor]

_PREFIX = "base_model.model."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What makes an adapter more than W0 + scale lora_B lora_A, where it is set.
_MORE = (
    *("use_dora", "use_qalora", "lora_bias", "layer_replication", "target_parameters"),
    *("trainable_token_indices", "alora_invocation_tokens", "arrow_config", "megatron_config"),
)
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change W0


def to_peft(
    path: str | os.PathLike[str],
    model: nn.Module,
    state: TensorDict,
    *,
    rank: int | None = None,
    tol: float = 1e-7,
) -> dict[str, float]:
    """Write the change as a LoRA adapter that `PeftModel.from_pretrained` loads.

    The adapter, on the model that `init` was given, computes what `call` does, up to the error:

        W0 + (alpha / rank) lora_B lora_A = W - E,    alpha = rank

    The rank of each module is the smallest within `tol`, see `delta`: at most 2 r K after K
    cycles. Parameters trained in full go out as `modules_to_save`, a tied weight under each of its
    modules: load such an adapter, but do not let peft merge it, which would add each to the one
    weight (`to_module` merges).

    Args:
        path: a folder, made if need be: `adapter_config.json` and `adapter_model.safetensors`.
        model: the model as `init` was given it.
        state: a state of `init` or `resample`, trained or not.
        rank: the largest rank of a module, in place of tol.
        tol: the largest error of a weight, relative to the weight.

    Returns:
        {name: |E| / |W|} for each adapted weight.

    Raises:
        ValueError: if an adapted weight is not that of an `nn.Linear`, `Conv1D` or `nn.Embedding`,
            or a parameter trained in full is not in a module of its own (named). Nothing is
            written then.

    Example:
        >>> import rosa_func, tempfile, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(60, 40))
        >>> state = rosa_func.init(model, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     errors = rosa_func.export.to_peft(folder, model, state)
        >>> max(errors.values()) < 1e-6
        True
    """
    from safetensors.torch import save_file

    change = delta(state, model, tol=tol, rank=rank)
    aliases, modules = targeting.aliases(model), dict(model.named_modules())
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, factors in change["change"].items():
        for alias in aliases[name]:
            module, A, B = alias.rpartition(".")[0], factors["A"], factors["B"]
            if A.shape[1] == 0:  # nothing changed; peft wants a rank of at least 1
                A, B = A.new_zeros(len(A), 1), B.new_zeros(1, B.shape[1])
            ranks[module] = A.shape[1]
            tensors |= _as_lora(modules[module], alias, A, B)
    first = {alias: name for name, names in aliases.items() for alias in names}
    saved = _whole_modules(change["full"], aliases, modules, set(ranks))
    for module in saved:
        for key, value in modules[module].state_dict(prefix=f"{module}.").items():
            tensors[_PREFIX + key] = change["full"].get(first[key], value)
    r = max(ranks.values())
    others = {f"^{module}": k for module, k in ranks.items() if k != r}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "r": r,
        "lora_alpha": r,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": _exactly(list(ranks), modules),
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(targeting.is_conv1d(modules[module]) for module in ranks),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / _WEIGHTS, {"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps(config, indent=2))
    return {name: float(error) for name, error in change["error"].items()}


def from_peft(model: nn.Module, path: str | os.PathLike[str]) -> TensorDict:
    """Return a peft LoRA adapter as a state, which can go on training, also by `resample`.

        R = W0,  A B = (alpha / rank) lora_B lora_A    (alpha / sqrt(rank) for rsLoRA)

    in the parameter's layout, the scale shared by both factors.

    Args:
        model: the base model of the adapter; the state shares its weights, as with `samplers.lora`.
        path: a folder with `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        A state. What else the file holds, as of `modules_to_save`, is trained in full.

    Raises:
        FileNotFoundError: if the folder lacks one of the files.
        ValueError: for an adapter that is not plain LoRA (what else it is, is named), or that
            changes only one of two tied weights.
        KeyError: if it changes a weight that the model has not.

    Example:
        >>> import rosa_func, tempfile, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(60, 40))
        >>> state = rosa_func.init(model, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     errors = rosa_func.export.to_peft(folder, model, state, rank=3)
        ...     state = rosa_func.export.from_peft(model, folder)
        >>> state["trainable", "0.weight", "A"].shape
        torch.Size([40, 3])
    """
    folder = Path(path)
    config, tensors = _read_adapter(folder)
    first = {alias: name for name, names in targeting.aliases(model).items() for alias in names}
    modules = dict(model.named_modules())
    products: dict[str, dict[str, Factors]] = {}
    whole: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
        module, lora, side = name.partition(".lora_")
        parameter = f"{module}.weight" if lora else name
        if parameter not in first:
            raise KeyError(f"the adapter in {folder} changes {name}, which the model has not")
        if not lora:
            whole[first[parameter]] = value
            if ".base_layer." in key and not torch.equal(value, model.get_parameter(parameter)):
                raise ValueError(f"the adapter in {folder} was made with another {parameter}")
        elif "A" in side:
            before, _, after = key.rpartition("_A")
            partner = tensors[f"{before}_B{after}"]
            scale = _scale(config, module, value.shape[0])
            product = _from_lora(modules[module], value, partner, scale)
            products.setdefault(first[parameter], {})[parameter] = product
    for name, by_alias in products.items():
        _refuse_half_a_tie(by_alias, [alias for alias in first if first[alias] == name])
    factors = {name: next(iter(by_alias.values())) for name, by_alias in products.items()}
    buffers = {name for name, _ in targeting.persistent_buffers(model)}
    whole = {name: value for name, value in whole.items() if name not in factors}
    state = states.init(
        model,
        {name: A.shape[1] for name, (A, _) in factors.items()},
        sampler=samplers.lora,
        targets=lambda name, _: name in factors,
        train=[name for name in whole if name not in buffers],
    )
    for name, pair in factors.items():
        for factor, value in zip("AB", pair, strict=True):
            like = state["trainable", name, factor]
            state["trainable", name, factor] = value.to(like).contiguous()
    for name, value in whole.items():
        part = "frozen" if name in buffers else "trainable"
        state[part, name] = value.to(state[part, name], copy=True)
    return state


def _as_lora(module: nn.Module, alias: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """Return A B, in the layout of the weight, as peft stores it for that module."""
    base, _, last = alias.rpartition(".")
    base = _PREFIX + base
    if last == "weight" and isinstance(module, nn.Embedding):
        return {f"{base}.lora_embedding_A": A.T, f"{base}.lora_embedding_B": B.T}
    if last == "weight" and targeting.is_conv1d(module):
        return {f"{base}.lora_A.weight": A.T, f"{base}.lora_B.weight": B.T}
    if last == "weight" and type(module) is nn.Linear:  # peft ignores adapters of its subclasses
        return {f"{base}.lora_A.weight": B, f"{base}.lora_B.weight": A}
    raise ValueError(
        f"{alias} belongs to {type(module).__name__}: an adapter is of nn.Linear, Conv1D and "
        "nn.Embedding weights; use export.to_module"
    )


def _from_lora(module: nn.Module, lora_A: Tensor, lora_B: Tensor, scale: float) -> Factors:
    """Return the factors A, B of the change of the weight, in its layout."""
    if isinstance(module, nn.Embedding) or targeting.is_conv1d(module):
        A, B = lora_A.T, lora_B.T
    else:
        A, B = lora_B, lora_A
    root = math.sqrt(abs(scale))
    A, B = A * root, B * math.copysign(root, scale)
    if A.shape[1] <= min(len(A), B.shape[1]):
        return A, B
    U, S, Vh = torch.linalg.svd(A @ B, full_matrices=False)  # more columns than a rank can be
    return U * S.sqrt(), S.sqrt()[:, None] * Vh


def _whole_modules(
    full: TensorDict,
    aliases: dict[str, list[str]],
    modules: dict[str, nn.Module],
    adapted: set[str],
) -> list[str]:
    """Return the modules that go out whole, for the tensors trained in full."""
    found: list[str] = []
    for name in full.keys():
        for alias in aliases[str(name)]:
            module = alias.rpartition(".")[0]
            if module in adapted or not module or list(modules[module].children()):
                raise ValueError(
                    f"{alias} was trained in full, and peft saves whole modules: it cannot save "
                    f"{module or 'the root module'}, which has "
                    f"{'an adapter' if module in adapted else 'modules in it'}; "
                    "use export.to_module"
                )
            found.append(module)
    for name in found:
        if more := [m for m in modules if m.endswith(name) and m not in found]:
            raise ValueError(
                f"{name} was trained in full, and peft, which matches the ends of names, would "
                f"take {more[0]} for it too; use export.to_module"
            )
    return list(dict.fromkeys(found))


def _exactly(names: list[str], modules: dict[str, nn.Module]) -> list[str] | str:
    """Return the names, or a pattern where peft, which matches the ends of names, takes more."""
    more = [m for m in modules if m not in names and any(m.endswith(f".{n}") for n in names)]
    return "|".join(map(re.escape, names)) if more else names


def _read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
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


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """Return alpha / rank, by the patterns of the config, which match the ends of names."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _refuse_half_a_tie(by_alias: dict[str, Factors], aliases: list[str]) -> None:
    pairs = list(by_alias.values())
    same = all(torch.equal(a, b) for pair in pairs for a, b in zip(pairs[0], pair, strict=True))
    if set(by_alias) != set(aliases) or not same:
        raise ValueError(
            f"{', '.join(aliases)} are one tied weight, and the adapter changes "
            f"{', '.join(by_alias)} {'alone' if same else 'differently'}: untie them first"
        )
