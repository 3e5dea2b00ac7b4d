"""A change of a model's weights as a peft LoRA adapter."""

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from rosa_func import modules
from rosa_func.files import model_card
from rosa_func.files.converted import names_of_old_experts
from rosa_func.files.peft_adapter import PREFIX
from rosa_func.files.peft_layers import (
    Factors,
    has_layer,
    of_layer,
    of_parameter,
    padded,
    why_no_parameter,
    wrapped,
)
from rosa_func.modules import is_conv1d

_ELSE = "use export.to_module"


class Adapter(NamedTuple):
    """The content of the files of an adapter."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    card: str


def adapter(model: nn.Module, change: Mapping[str, Factors], full: Mapping[str, Tensor]) -> Adapter:
    """Return the adapter that adds A B to some weights of a model, and replaces others.

    Args:
        model: the model without the change.
        change: {name: (A, B)}, in the layout of the weight.
        full: {name: tensor} for what is replaced.

    Raises:
        ValueError: if peft would not load it as that (what, and why, is named).
    """
    aliases, named = modules.aliases(model), dict(model.named_modules())
    if not change:
        raise ValueError(
            "the state adapts no weight, and peft loads an adapter only if it adapts at least "
            f"one; {_ELSE}"
        )
    factors = {alias: pair for name, pair in change.items() for alias in aliases[name]}
    for alias in [*factors, *(alias for name in full for alias in aliases[name])]:
        _refuse_place(alias, named)
    in_layers, in_parameters = _sorted(model, named, factors)
    saved, task = _saved_whole(model, full, aliases, named, factors)
    if tied := [names for name, names in aliases.items() if name in change and len(names) > 1]:
        warnings.warn(
            f"{', '.join(tied[0])} are one tied weight: the adapter is right as it is loaded, but "
            "peft must not merge it, which would add the change once for each name",
            stacklevel=3,
        )
    # Not all that read adapters know of a rank or an alpha for each weight.
    r = max(1, *(A.shape[-1] for A, _ in factors.values()))
    tensors = _of_layers(in_layers, named, r) | _of_parameters(in_parameters, model, named, r)
    first = {alias: name for name, names in aliases.items() for alias in names}
    for module in saved:
        for key, value in named[module].state_dict(prefix=f"{module}.").items():
            tensors[key] = full.get(first[key], value)
    layers = [_module(alias) for alias in in_layers]
    config = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": model_card.base_model(model),
        "r": r,
        "lora_alpha": r,
        "target_modules": _exactly(layers, named, names_of_old_experts(model)),
        "target_parameters": list(in_parameters) or None,
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(is_conv1d(named[module]) for module in layers),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    card = model_card.card(model, task, len(change), r, len(saved))
    return Adapter(config, {PREFIX + key: value for key, value in tensors.items()}, card)


def _module(alias: str) -> str:
    return alias.rpartition(".")[0]


def _refuse_place(alias: str, named: dict[str, nn.Module]) -> None:
    """Refuse what is not in a module that peft can replace."""
    module = _module(alias)
    if not module:
        raise ValueError(
            f"{alias} belongs to the model itself, and peft replaces modules in it; {_ELSE}"
        )
    if module not in named:
        raise ValueError(
            f"{module} is one module in several places, and peft would replace it in one; {_ELSE}"
        )


def _sorted(
    model: nn.Module, named: dict[str, nn.Module], factors: dict[str, Factors]
) -> tuple[dict[str, Factors], dict[str, Factors]]:
    """Divide the factors into those of layers and those of parameters, or say what is neither."""
    old_experts = names_of_old_experts(model)
    in_layers, in_parameters = {}, {}
    for alias, pair in factors.items():
        path, _, last = alias.rpartition(".")
        module = named[path]
        if has_layer(module, last) and path.rpartition(".")[2] not in old_experts:
            in_layers[alias] = pair
            continue
        if why := why_no_parameter(module, getattr(module, last)):
            raise ValueError(f"{alias} {why}; {_ELSE}")
        in_parameters[alias] = pair
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for alias in in_parameters:
        if more := [name for name in every if name.endswith(f".{alias}")]:
            raise ValueError(
                f"peft, which matches the ends of names, would take {more[0]} for {alias} too; "
                f"{_ELSE}"
            )
    conv1d = [alias for alias in in_layers if is_conv1d(named[_module(alias)])]
    if conv1d and in_parameters:
        raise ValueError(
            f"{conv1d[0]} belongs to Conv1D and {next(iter(in_parameters))} to no layer that peft "
            f"has: it cannot load both in one adapter; {_ELSE}"
        )
    return in_layers, in_parameters


def _of_layers(
    factors: dict[str, Factors], named: dict[str, nn.Module], r: int
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for alias, pair in factors.items():
        module = _module(alias)
        held = of_layer(named[module], *padded(*pair, r))
        tensors |= {f"{module}.{end}": value for end, value in held.items()}
    return tensors


def _of_parameters(
    factors: dict[str, Factors], model: nn.Module, named: dict[str, nn.Module], r: int
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for place, alias in wrapped(model, factors).items():
        held = of_parameter(named[_module(alias)], *padded(*factors[alias], r))
        tensors |= {f"{place}.{end}": value for end, value in held.items()}
    return tensors


def _saved_whole(
    model: nn.Module,
    full: Iterable[str],
    aliases: dict[str, list[str]],
    named: dict[str, nn.Module],
    adapted: Iterable[str],
) -> tuple[list[str], str | None]:
    """Return the modules that go out whole, and the task that peft is told.

    Of some tasks peft expects the head to be there, whole, so it is told of them only if it is.
    """
    owners = {_module(alias) for alias in adapted}
    task = model_card.task_type(model)
    heads = model_card.heads(model, task)
    inside = {path for path in owners for head in heads if f"{path}.".startswith(f"{head}.")}
    nested = any(other.startswith(f"{head}.") for head in heads for other in heads)
    if task in model_card.HEADS and (not heads or inside or nested):
        heads, task = [], None
    found = list(heads)
    for name in full:
        for alias in aliases[name]:
            module = _module(alias)
            if any(alias.startswith(f"{head}.") for head in heads):
                continue
            if module in owners or list(named[module].children()):
                raise ValueError(
                    f"{alias} was trained in full, and peft saves whole modules: it cannot save "
                    f"{module}, which has "
                    f"{'an adapter' if module in owners else 'modules in it'}; {_ELSE}"
                )
            found.append(module)
    for name in found:
        if more := [m for m in named if m.endswith(name) and m not in found]:
            raise ValueError(
                f"{name} was trained in full, and peft, which matches the ends of names, would "
                f"take {more[0]} for it too; {_ELSE}"
            )
    return list(dict.fromkeys(found)), task


def _exactly(
    names: list[str], named: Collection[str], old_experts: frozenset[str]
) -> list[str] | str:
    """Return the names, or a pattern where peft, which matches the ends of names, takes more."""
    more = [m for m in named if m not in names and any(m.endswith(f".{n}") for n in names)]
    if more and old_experts:  # peft reduces a pattern to the last parts of what it matches
        raise ValueError(
            f"peft, which matches the ends of names, would adapt {more[0]} too; {_ELSE}"
        )
    return "|".join(map(re.escape, names)) if more else names
