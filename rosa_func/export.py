"""Out to plain modules and to peft adapters, and in from them."""

import os
from pathlib import Path

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from rosa_func import modules, samplers
from rosa_func.checkpoint import delta
from rosa_func.cycle import init, merge
from rosa_func.files.peft_adapter import (
    PREFIX,
    Factors,
    as_lora,
    exactly,
    from_lora,
    read_adapter,
    scale,
    write_adapter,
)
from rosa_func.forward import check_fit
from rosa_func.modules import is_conv1d, with_tensors
from rosa_func.weight import Parts, read, write
from rosa_func.weight.low_rank import LowRank, low_rank


def to_module(model: nn.Module, state: TensorDict) -> nn.Module:
    """Return a new plain module of the same class with the merged weights.

    It shares no memory with the model or the state, has the ties of the model, and is all that
    `save_pretrained` or `generate` need.

    Args:
        model: the model, or its `skeleton`; it is not written to.
        state: a state of `init` or `resample`.

    Returns:
        A module with the weights of `merge(state)`, in the model's mode.

    Raises:
        KeyError, ValueError: if model and state do not fit, as in `call`.

    Example:
        >>> import rosa_func, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> state, x = rosa_func.init(model, 2), torch.ones(3, 6)
        >>> merged = rosa_func.export.to_module(model, state)
        >>> torch.allclose(merged(x), rosa_func.call(model, state, x), atol=1e-6)
        True
    """
    names, merged = check_fit(model, state), merge(state)
    return with_tensors(model, {name: merged[own].clone() for name, own in names.items()})


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
    change = delta(state, model, tol=tol, rank=rank)
    aliases, named = modules.aliases(model), dict(model.named_modules())
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, factors in change["change"].items():
        for alias in aliases[name]:
            module, A, B = alias.rpartition(".")[0], factors["A"], factors["B"]
            if A.shape[1] == 0:  # nothing changed; peft wants a rank of at least 1
                A, B = A.new_zeros(len(A), 1), B.new_zeros(1, B.shape[1])
            ranks[module] = A.shape[1]
            tensors |= as_lora(named[module], alias, A, B)
    first = {alias: name for name, names in aliases.items() for alias in names}
    saved = _whole_modules(change["full"], aliases, named, set(ranks))
    for module in saved:
        for key, value in named[module].state_dict(prefix=f"{module}.").items():
            tensors[PREFIX + key] = change["full"].get(first[key], value)
    r = max(ranks.values())
    others = {f"^{module}": k for module, k in ranks.items() if k != r}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "r": r,
        "lora_alpha": r,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": exactly(list(ranks), named),
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(is_conv1d(named[module]) for module in ranks),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    write_adapter(Path(path), config, tensors)
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
        KeyError: if it changes a weight that the model does not have.

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
    config, tensors = read_adapter(folder)
    first = {alias: name for name, names in modules.aliases(model).items() for alias in names}
    named = dict(model.named_modules())
    products: dict[str, dict[str, Factors]] = {}
    whole: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        module, lora, side = name.partition(".lora_")
        parameter = f"{module}.weight" if lora else name
        if parameter not in first:
            raise KeyError(f"the adapter in {folder} changes {name}, which the model does not have")
        if not lora:
            whole[first[parameter]] = value
            if ".base_layer." in key and not torch.equal(value, model.get_parameter(parameter)):
                raise ValueError(f"the adapter in {folder} was made with another {parameter}")
        elif "A" in side:
            before, _, after = key.rpartition("_A")
            partner = tensors[f"{before}_B{after}"]
            size = scale(config, module, value.shape[0])
            product = from_lora(named[module], value, partner, size)
            products.setdefault(first[parameter], {})[parameter] = product
    for name, by_alias in products.items():
        _refuse_half_a_tie(by_alias, [alias for alias in first if first[alias] == name])
    factors = {name: next(iter(by_alias.values())) for name, by_alias in products.items()}
    buffers = {name for name, _ in modules.persistent_buffers(model)}
    whole = {name: value for name, value in whole.items() if name not in factors}
    start = read(
        init(
            model,
            {name: A.shape[1] for name, (A, _) in factors.items()},
            sampler=samplers.lora,
            targets=lambda name, _: name in factors,
            train=[name for name in whole if name not in buffers],
        )
    )
    frozen = dict(start.frozen)
    for name, w in start.adapted().items():
        like = low_rank(w)
        pair = (new.to(old).contiguous() for new, old in zip(factors[name], like, strict=True))
        frozen[name] = w._replace(terms=(LowRank(*pair),))
    frozen |= {
        name: whole[name].to(like, copy=True)
        for name, like in start.frozen.items()
        if name in whole and isinstance(like, Tensor)
    }
    full = {name: whole[name].to(value, copy=True) for name, value in start.full.items()}
    return write(Parts(frozen, full))


def _whole_modules(
    full: TensorDict,
    aliases: dict[str, list[str]],
    named: dict[str, nn.Module],
    adapted: set[str],
) -> list[str]:
    """Return the modules that go out whole, for the tensors trained in full."""
    found: list[str] = []
    for name in full.keys():
        for alias in aliases[str(name)]:
            module = alias.rpartition(".")[0]
            if module in adapted or not module or list(named[module].children()):
                raise ValueError(
                    f"{alias} was trained in full, and peft saves whole modules: it cannot save "
                    f"{module or 'the root module'}, which has "
                    f"{'an adapter' if module in adapted else 'modules in it'}; "
                    "use export.to_module"
                )
            found.append(module)
    for name in found:
        if more := [m for m in named if m.endswith(name) and m not in found]:
            raise ValueError(
                f"{name} was trained in full, and peft, which matches the ends of names, would "
                f"take {more[0]} for it too; use export.to_module"
            )
    return list(dict.fromkeys(found))


def _refuse_half_a_tie(by_alias: dict[str, Factors], aliases: list[str]) -> None:
    pairs = list(by_alias.values())
    same = all(torch.equal(a, b) for pair in pairs for a, b in zip(pairs[0], pair, strict=True))
    if set(by_alias) != set(aliases) or not same:
        raise ValueError(
            f"{', '.join(aliases)} are one tied weight, and the adapter changes "
            f"{', '.join(by_alias)} {'alone' if same else 'differently'}: untie them first"
        )
