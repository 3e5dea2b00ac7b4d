"""Which weights are adapted, which are trained in full, and at what rank."""

import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from rosa_func._torch import Convolution
from rosa_func.keys import canonical
from rosa_func.modules import Parameter, is_conv1d, parameters, some, tensors, unwrapped
from rosa_func.patterns import (
    Rank,
    check_rank_patterns,
    listed,
    matches_nothing,
    names_part,
    names_weight,
    rank,
    select,
)
from rosa_func.weight import rounding

Predicate = Callable[[str, nn.Module], bool]
_ROUTER = re.compile("Router|TopKGating")

Targets = str | Iterable[str] | Predicate | None


class Target(NamedTuple):
    """How a weight is to be adapted.

    Attributes:
        r: the rank.
        input_dim: the dimension that meets the layer's input, 0 or 1; -2 or -1 in a batch.
    """

    r: int
    input_dim: int


class Plan(NamedTuple):
    """What `init` will do.

    Attributes:
        names: of all tensors of the state, in the model's order.
        adapted: {name: rank and input dimension}.
        full: the names of those trained in full.
    """

    names: list[str]
    adapted: dict[str, Target]
    full: list[str]


def plan(model: nn.Module, r: Rank | None, targets: Targets, train: str | Iterable[str]) -> Plan:
    """Resolve `r`, `targets` and `train` against the model, or say what is wrong with them."""
    named = {name: _with_plain_names(p) for name, p in parameters(model).items()}
    _refuse_max_norm(model)
    _refuse_peft(model)
    backbone, head = _backbone_and_head(model, named)
    full = _full(named, train, head)
    if targets is None:
        adapted = _default(model, named, backbone, full)
    else:
        adapted = _adapted(named, targets)
    if not adapted and not full:
        raise ValueError(
            "targets is empty: name at least one weight, or pass None; or train=... alone"
        )
    if both := [name for name in adapted if name in set(full)]:
        raise ValueError(
            f"{some(both)} would be both adapted and trained in full; "
            "take it out of `targets` or out of `train`"
        )
    for name in [*adapted, *full]:
        refuse_dtype(name, named[name].value)
    _warn_of_frozen_head(model, head, {*adapted, *full})
    check_rank_patterns(r, [alias for name in adapted for alias in named[name].names])
    return Plan(
        names=list(tensors(model)),
        adapted={name: _target(r, name, named[name]) for name in adapted},
        full=full,
    )


def _target(r: Rank | None, name: str, parameter: Parameter) -> Target:
    shape, owner = parameter.value.shape, parameter.owners[0]
    if shape.numel() == 0:
        raise ValueError(f"{name} is empty, of shape {tuple(shape)}: nothing to factor")
    if r is None:
        raise TypeError(f"r is None: pass the rank of {name} and the other adapted weights")
    if len(shape) == 2 or isinstance(owner, Convolution):
        matrix = (shape[0], math.prod(shape[1:]))
        return Target(rank(r, parameter.names, matrix), 0 if is_conv1d(owner) else 1)
    transposed = getattr(owner, "is_transposed", False) is True
    return Target(rank(r, parameter.names, (shape[-2], shape[-1])), -2 if transposed else -1)


def _refuse_max_norm(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if getattr(module, "max_norm", None) is not None and isinstance(
            module, nn.Embedding | nn.EmbeddingBag
        ):
            raise ValueError(
                f"{name or type(module).__name__} is an embedding with max_norm="
                f"{module.max_norm}: its forward pass renormalises the weight in place, "
                "which would write into the model; set max_norm=None"
            )


def refuse_dtype(name: str, weight: Tensor) -> None:
    """Refuse a weight that cannot be split, or whose values would not be kept."""
    if weight.dtype not in rounding.SUPPORTED:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in rounding.SUPPORTED)
        raise TypeError(f"{name} is of dtype {weight.dtype}; it must be one of {known}")


def _backbone_and_head(
    model: nn.Module, parameters: dict[str, Parameter]
) -> tuple[list[str], list[str]]:
    """Split the names: a transformers model has a `base_model`; what is outside is its head."""
    model = unwrapped(model)
    output: Any = getattr(model, "get_output_embeddings", lambda: None)()
    excluded = {id(p) for p in output.parameters()} if output is not None else set()
    names = [name for name, p in parameters.items() if id(p.value) not in excluded]
    base = getattr(model, "base_model", None)
    if not isinstance(base, nn.Module) or base is model:
        return names, []
    inside = {id(p) for p in base.parameters()}
    backbone = [name for name in names if id(parameters[name].value) in inside]
    return backbone, [name for name in names if id(parameters[name].value) not in inside]


def _warn_of_frozen_head(model: nn.Module, head: list[str], used: set[str]) -> None:
    # A language-model head comes with the pretrained weights; a task head starts at random.
    if not head or used & set(head) or unwrapped(model).get_output_embeddings() is not None:  # type: ignore[operator]
        return
    warnings.warn(
        f"the task head ({some(head)}) stays frozen at its values, which are random unless you "
        'loaded trained ones; pass train="head" to train it',
        stacklevel=4,
    )


def _full(
    parameters: dict[str, Parameter], train: str | Iterable[str], head: list[str]
) -> list[str]:
    """Return the names trained in full: a plain name means a module or parameter of that name."""
    chosen: set[str] = set()
    for pattern in listed(train, "train"):
        found = head if pattern == "head" else []
        found = found or select(parameters, pattern, names_part)
        if not found:
            near = matches_nothing(pattern, parameters, names_part)
            raise ValueError(f"{pattern!r} in train {near}")
        chosen.update(found)
    return [name for name in parameters if name in chosen]


def _adapted(parameters: dict[str, Parameter], targets: Targets) -> list[str]:
    """Return the adapted names: those chosen that are matrices."""
    if callable(targets) and not isinstance(targets, type):
        chosen = {name for name, p in parameters.items() if targets(name, p.owners[0])}
        if not chosen:
            raise ValueError("the predicate given as targets chose no parameter")
        _refuse_vectors("the predicate given as targets", chosen, parameters)
    else:
        chosen = set()
        for pattern in listed(targets, "targets"):
            found = select(parameters, pattern, names_weight)
            if not found:
                matrices = [name for name, p in parameters.items() if p.value.ndim >= 2]
                near = matches_nothing(pattern, matrices, names_weight)
                raise ValueError(f"{pattern!r} in targets {near}")
            _refuse_vectors(f"{pattern!r} in targets", found, parameters)
            chosen.update(found)
    return [name for name, p in parameters.items() if name in chosen and _is_matrix(name, p)]


def _is_matrix(name: str, parameter: Parameter) -> bool:
    """Return whether it can be factored; the biases of all experts of a layer are no matrix."""
    return parameter.value.ndim >= 2 and not name.endswith("bias")


def _with_plain_names(parameter: Parameter) -> Parameter:
    """Add the names without the prefixes of wrappers, for patterns to match."""
    plain = [canonical(name) for name in parameter.names]
    return parameter._replace(names=list(dict.fromkeys([*parameter.names, *plain])))


def _default(
    model: nn.Module, named: dict[str, Parameter], backbone: list[str], full: list[str]
) -> list[str]:
    """Return the weights of linear layers and the experts of the backbone, less those in full."""
    left = set(full) | _routers(model, named)
    rest = [name for name in backbone if name not in left]
    adapted = [name for name in rest if _is_linear(named[name], name) or _is_experts(named[name])]
    if not adapted and not full:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear or Conv1D weight to adapt; "
            "name the weights with targets=..."
        )
    others = [name for name in rest if name not in set(adapted) and _is_left_out(named[name], name)]
    if others:
        warnings.warn(
            f"{some(others)} of the backbone: frozen, since the default targets are the weights of "
            "nn.Linear and Conv1D and of experts; name them in targets to adapt them, or pass "
            "targets=... without them",
            stacklevel=4,
        )
    return adapted


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


def _is_left_out(parameter: Parameter, name: str) -> bool:
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


def _refuse_peft(model: nn.Module) -> None:
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    for name, module in model.named_modules() if tuners is not None else ():
        if isinstance(module, tuners.BaseTunerLayer):  # type: ignore[union-attr]
            raise TypeError(
                f"{name} is a layer of peft: pass the base model, or merge the adapter into it "
                "with merge_and_unload(), or turn it into a state with export.from_peft"
            )


def _refuse_vectors(who: str, found: Iterable[str], parameters: dict[str, Parameter]) -> None:
    found = list(found)
    if not any(_is_matrix(name, parameters[name]) for name in found):
        shapes = some([f"{name} of shape {tuple(parameters[name].value.shape)}" for name in found])
        raise ValueError(
            f"{who} matches only {shapes}: a weight needs two dimensions to be factored; "
            "use train=... to train it in full"
        )
