"""A peft LoRA adapter as a change of a model's weights."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rosa_func import modules
from rosa_func.files import peft_adapter
from rosa_func.files.peft_adapter import PREFIX, read_adapter
from rosa_func.files.peft_layers import Factors, from_layer, from_parameter, scaled, wrapped

_Values = tuple[Tensor, ...]  # two factors, or a tensor as a whole


class Change(NamedTuple):
    """What an adapter changes, by the first names of the tensors of the model.

    Attributes:
        factors: {name: (A, B)}: A B is added.
        whole: {name: tensor}: the tensor is replaced.
    """

    factors: dict[str, Factors]
    whole: dict[str, Tensor]


def read_change(model: nn.Module, folder: Path) -> Change:
    """Read the adapter in a folder, and make sure that it is one of that model.

    Raises:
        FileNotFoundError: if the folder lacks one of the files.
        ValueError: for an adapter that is not plain LoRA, is of other shapes, or changes tied
            weights in different ways.
        KeyError: if it changes a weight that the model does not have, or a factor is missing.
    """
    config, tensors = read_adapter(folder)
    aliases, own = modules.aliases(model), modules.tensors(model)
    first = {alias: name for name, names in aliases.items() for alias in names}
    parameters = wrapped(model, config.get("target_parameters") or ())
    changes: dict[str, dict[str, _Values]] = {}
    for key, value in tensors.items():
        place, lora, side = key.removeprefix(PREFIX).partition(".lora_")
        path = ".".join(part for part in place.split(".") if part != "base_layer")
        alias = parameters.get(place, f"{path}.weight") if lora else path
        if alias not in first:
            raise KeyError(
                f"the adapter in {folder} changes {key.removeprefix(PREFIX)}, which the model "
                "does not have"
            )
        if lora and "A" not in side:
            continue
        W = own[first[alias]]
        if lora:
            partner = key.replace(f".lora_{side}", f".lora_{side.replace('A', 'B')}")
            if partner not in tensors:
                raise KeyError(f"the adapter in {folder} lacks {partner}")
            pair = (value, tensors[partner])
            values: _Values = _factors(model, config, alias, place in parameters, pair, W, folder)
        else:
            _refuse_shape(folder, model, alias, tuple(value.shape), W)
            if path != place:  # the frozen weight of a layer that is adapted
                if not torch.equal(value, W):
                    raise ValueError(f"the adapter in {folder} was made with another {alias}")
                continue
            values = (value,)
        by_alias = changes.setdefault(first[alias], {})
        by_alias[alias] = values
        if not lora and not _is_saved_whole(config, alias):
            for other in aliases[first[alias]]:  # it is the one tied weight itself
                by_alias.setdefault(other, values)
    for name, by_alias in changes.items():
        _refuse_half_a_tie(by_alias, aliases[name])
    single = {name: next(iter(by_alias.values())) for name, by_alias in changes.items()}
    return Change(
        factors={name: (v[0], v[1]) for name, v in single.items() if len(v) == 2},
        whole={name: v[0] for name, v in single.items() if len(v) == 1},
    )


def _factors(
    model: nn.Module,
    config: dict[str, Any],
    alias: str,
    is_parameter: bool,
    held: Factors,
    W: Tensor,
    folder: Path,
) -> Factors:
    """Return the scaled factors of the change of a weight W, of the shape of W."""
    path = alias.rpartition(".")[0]
    module = model.get_submodule(path)
    if is_parameter:
        r = peft_adapter.rank(config, alias)
        if len(held[0]) % r or held[1].shape[1] % r or (W.ndim != 3 and len(held[0]) != r):
            shapes = " and ".join(str(tuple(factor.shape)) for factor in held)
            raise ValueError(
                f"the adapter in {folder} holds factors of shapes {shapes} for {alias} of shape "
                f"{tuple(W.shape)}, which are not of the rank {r} of its config"
            )
        A, B = from_parameter(module, *held, r, W.ndim)
        matrices = W
    else:
        r = held[0].shape[0]
        A, B = from_layer(module, *held)
        matrices = W.flatten(1)
    _refuse_shape(folder, model, alias, (*A.shape[:-1], B.shape[-1]), matrices)
    return scaled(A, B, peft_adapter.scale(config, alias if is_parameter else path, r))


def _is_saved_whole(config: dict[str, Any], alias: str) -> bool:
    """Return whether peft holds a copy of the module of that tensor, not tied to anything."""
    parts = alias.split(".")
    paths = [".".join(parts[:end]) for end in range(1, len(parts))]
    return any(path.endswith(name) for path in paths for name in config["modules_to_save"] or ())


def _refuse_shape(
    folder: Path, model: nn.Module, alias: str, shape: tuple[int, ...], W: Tensor
) -> None:
    if shape != tuple(W.shape):
        raise ValueError(
            f"the adapter in {folder} changes {alias} of shape {shape}, and "
            f"{type(model).__name__} has it of shape {tuple(W.shape)}: it was made for another "
            "model"
        )


def _refuse_half_a_tie(by_alias: dict[str, _Values], aliases: list[str]) -> None:
    every = list(by_alias.values())
    same = all(len(values) == len(every[0]) for values in every) and all(
        torch.equal(a, b) for values in every for a, b in zip(every[0], values, strict=True)
    )
    if set(by_alias) != set(aliases) or not same:
        raise ValueError(
            f"{', '.join(aliases)} are one tied weight, and the adapter changes "
            f"{', '.join(by_alias)} {'alone' if same else 'differently'}: untie them first"
        )
