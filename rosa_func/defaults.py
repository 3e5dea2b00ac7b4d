"""What of a model is its backbone, and which weights are adapted where none are named."""

import re
from typing import Any

from torch import nn

from rosa_func._torch import Convolution
from rosa_func.modules import Parameter, is_conv1d, unwrapped

_ROUTER = re.compile("Router|TopKGating")


def backbone_and_head(model: nn.Module, named: dict[str, Parameter]) -> tuple[list[str], list[str]]:
    """Split the names: a transformers model has a `base_model`; what is outside is its head."""
    model = unwrapped(model)
    output: Any = getattr(model, "get_output_embeddings", lambda: None)()
    excluded = {id(p) for p in output.parameters()} if output is not None else set()
    names = [name for name, p in named.items() if id(p.value) not in excluded]
    base = getattr(model, "base_model", None)
    if not isinstance(base, nn.Module) or base is model:
        return names, []
    inside = {id(p) for p in base.parameters()}
    backbone = [name for name in names if id(named[name].value) in inside]
    return backbone, [name for name in names if id(named[name].value) not in inside]


def linear_and_experts(
    model: nn.Module, named: dict[str, Parameter], rest: list[str]
) -> tuple[list[str], list[str]]:
    """Return the weights of linear layers and the experts, and the matrices that are neither.

    What routes to experts is in neither of the two.
    """
    routers = _routers(model, named)
    rest = [name for name in rest if name not in routers]
    found = [name for name in rest if _is_linear(named[name], name) or _is_experts(named[name])]
    others = set(rest) - set(found)
    return found, [name for name in rest if name in others and _is_matrix(named[name], name)]


def _is_linear(parameter: Parameter, name: str) -> bool:
    """Return whether it is the weight of linear layers alone: not one tied to an embedding."""
    linear = (isinstance(owner, nn.Linear) or is_conv1d(owner) for owner in parameter.owners)
    return name.split(".")[-1] == "weight" and all(linear)


def _is_experts(parameter: Parameter) -> bool:
    """Return whether it holds the matrices of all experts of a layer."""
    owner = parameter.owners[0]
    return parameter.value.ndim == 3 and "Experts" in type(owner).__name__


def _routers(model: nn.Module, named: dict[str, Parameter]) -> set[str]:
    """Return the parameters that choose experts, by the names of transformers' modules."""
    found: set[int] = set()
    for name, module in model.named_modules():
        children = dict(module.named_children())
        if _ROUTER.search(type(module).__name__) or "router" in name.rpartition(".")[2]:
            found |= {id(p) for p in module.parameters()}
        elif any("expert" in child for child in children):
            gates = (c for name, c in children.items() if name == "gate" or name.endswith("_gate"))
            found |= {id(p) for gate in gates for p in gate.parameters()}
    return {name for name, parameter in named.items() if id(parameter.value) in found}


def _is_matrix(parameter: Parameter, name: str) -> bool:
    """Return whether it looks like a matrix that a linear layer multiplies with, by its module.

    Embeddings, convolutions, biases and what routes to experts are left out without a word.
    """
    shape = parameter.value.shape
    known = (nn.Embedding, nn.EmbeddingBag, Convolution)
    words = name.lower() + type(parameter.owners[0]).__name__.lower()
    return (
        len(shape) >= 2
        and min(shape[-2:]) > 1
        and not any(isinstance(owner, known) for owner in parameter.owners)
        and not any(word in words for word in ("embed", "bias", "position"))
    )
