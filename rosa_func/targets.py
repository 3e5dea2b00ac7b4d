"""Which weights are adapted, which are trained in full, and at what rank."""

import difflib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor, nn

from rosa_func import exact

Rank = int | float | Mapping[str, int | float]
Predicate = Callable[[str, nn.Module], bool]
Targets = str | Iterable[str] | Predicate | None


class Parameter(NamedTuple):
    """One parameter of a model: the modules that own it, and every name it has."""

    value: Tensor
    owners: list[nn.Module]
    names: list[str]


class Plan(NamedTuple):
    """What `init` will do: the input dimension of each adapted weight, and the names in full."""

    adapted: dict[str, int]
    full: list[str]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and the persistent buffers, a tied one once, under its first name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is an nn.Module, got {type(model).__name__}")
    both = chain(model.named_parameters(), persistent_buffers(model))
    return {name: tensor.detach() for name, tensor in both}


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that a state holds, a tied one once, under its first name."""
    seen = set()
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None or name in module._non_persistent_buffers_set or id(buffer) in seen:
                continue
            seen.add(id(buffer))
            yield f"{prefix}.{name}" if prefix else name, buffer


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """Return every name of each tensor of `tensors`."""
    named = {name: parameter.names for name, parameter in _parameters(model).items()}
    return named | {name: [name] for name, _ in persistent_buffers(model)}


def plan(model: nn.Module, targets: Targets, train: str | Iterable[str]) -> Plan:
    """Resolve `targets` and `train` against the model, or say what is wrong with them."""
    parameters = _parameters(model)
    _refuse_max_norm(model)
    backbone, head = _backbone_and_head(model, parameters)
    full = _full(parameters, train, head)
    if targets is None:
        adapted = [name for name in backbone if _is_linear(parameters[name], name)]
        if not adapted:
            raise ValueError(
                f"{type(model).__name__} has no nn.Linear or Conv1D weight to adapt; "
                "name the weights with targets=..."
            )
    else:
        adapted = _adapted(parameters, targets)
    if both := [name for name in adapted if name in set(full)]:
        raise ValueError(
            f"{_some(both)} would be both adapted and trained in full; "
            "take it out of `targets` or out of `train`"
        )
    for name in [*adapted, *full]:
        refuse_dtype(name, parameters[name].value)
    _warn_of_frozen_head(model, head, {*adapted, *full})
    return Plan({name: _input_dim(parameters[name].owners[0]) for name in adapted}, full)


def rank(r: Rank, name: str, shape: tuple[int, int]) -> int:
    """Resolve r for a weight of that name, whose matrix is of that shape."""
    if isinstance(r, Mapping):
        for pattern, value in r.items():
            if _names_weight(pattern, name):
                return rank(value, name, shape)
        raise ValueError(
            f"no pattern of r={dict(r)!r} matches {name}; add a last pattern '*' for the rest"
        )
    limit = min(shape)
    if isinstance(r, bool) or not isinstance(r, int | float):
        raise TypeError(
            f"a rank is an int or a fraction in (0, 1), got {r!r} of type {type(r).__name__}"
        )
    if isinstance(r, float):
        if not 0 < r < 1:
            raise ValueError(
                f"a fractional rank lies in (0, 1), got {r!r}; pass an int for a rank as such"
            )
        return max(1, int(round(r * limit, 9)))  # 0.29 of 100 is 28.999999999999996
    if r < 1:
        raise ValueError(f"a rank is at least 1, got {r}")
    if r > limit:
        raise ValueError(
            f"rank {r} is larger than min{shape} = {limit} of {name}; "
            "pass a smaller rank, a fraction, or a mapping from patterns to ranks"
        )
    return r


def check_rank_patterns(r: Rank, names: Iterable[str]) -> None:
    """Refuse a mapping of ranks in which a pattern matches none of the adapted weights."""
    names = list(names)
    for pattern in r if isinstance(r, Mapping) else ():
        if not isinstance(pattern, str):
            raise TypeError(f"a mapping of ranks has patterns as its keys, got {pattern!r}")
        if not any(_names_weight(pattern, name) for name in names):
            raise ValueError(f"{pattern!r} in r {_matches_nothing(pattern, names, _names_weight)}")


def _parameters(model: nn.Module) -> dict[str, Parameter]:
    """Return every parameter by its first name."""
    found: dict[int, Parameter] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, value in module._parameters.items():
            if value is not None:
                entry = found.setdefault(id(value), Parameter(value, [], []))
                entry.owners.append(module)
                entry.names.append(f"{prefix}.{name}" if prefix else name)
    return {name: found[id(value)] for name, value in model.named_parameters()}


def refuse_meta(model: nn.Module) -> None:
    """Refuse a model without weights."""
    if meta := [name for name, p in model.named_parameters() if p.is_meta]:
        raise ValueError(f"{_some(meta)} is on the meta device: load the weights first")


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
    if weight.dtype not in exact.SUPPORTED:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in exact.SUPPORTED)
        raise TypeError(f"{name} is of dtype {weight.dtype}; it must be one of {known}")


def _backbone_and_head(
    model: nn.Module, parameters: dict[str, Parameter]
) -> tuple[list[str], list[str]]:
    """Split the names: a transformers model has a `base_model`; what is outside is its head."""
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
    if not head or used & set(head) or model.get_output_embeddings() is not None:  # type: ignore[operator]
        return
    warnings.warn(
        f"the task head ({_some(head)}) stays frozen at its values, which are random unless you "
        'loaded trained ones; pass train="head" to train it',
        stacklevel=5,
    )


def _full(
    parameters: dict[str, Parameter], train: str | Iterable[str], head: list[str]
) -> list[str]:
    """Return the names trained in full: a plain name means a module or parameter of that name."""
    chosen: set[str] = set()
    for pattern in _patterns(train, "train"):
        found = head if pattern == "head" else []
        found = found or _select(parameters, pattern, _names_part)
        if not found:
            near = _matches_nothing(pattern, parameters, _names_part)
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
        for pattern in _patterns(targets, "targets"):
            found = _select(parameters, pattern, _names_weight)
            if not found:
                matrices = [name for name, p in parameters.items() if p.value.ndim >= 2]
                near = _matches_nothing(pattern, matrices, _names_weight)
                raise ValueError(f"{pattern!r} in targets {near}")
            _refuse_vectors(f"{pattern!r} in targets", found, parameters)
            chosen.update(found)
        if not chosen:
            raise ValueError("targets is empty: name at least one weight, or pass None")
    return [name for name, p in parameters.items() if name in chosen and p.value.ndim >= 2]


def _refuse_vectors(who: str, found: Iterable[str], parameters: dict[str, Parameter]) -> None:
    found = list(found)
    if all(parameters[name].value.ndim < 2 for name in found):
        shapes = _some([f"{name} of shape {tuple(parameters[name].value.shape)}" for name in found])
        raise ValueError(
            f"{who} matches only {shapes}: a weight needs two dimensions to be factored; "
            "use train=... to train it in full"
        )


def _patterns(given: Any, argument: str) -> list[str]:
    patterns = [given] if isinstance(given, str) else given
    if not isinstance(patterns, Iterable):
        either = " or a predicate (name, module) -> bool" if argument == "targets" else ""
        raise TypeError(f"{argument} takes a string or strings{either}, got {given!r}")
    patterns = list(patterns)
    if wrong := [p for p in patterns if not isinstance(p, str)]:
        raise TypeError(
            f"{argument} takes strings, got {wrong[0]!r} of type {type(wrong[0]).__name__}"
        )
    return patterns


def _select(
    parameters: dict[str, Parameter], pattern: str, matches: Callable[[str, str], bool]
) -> list[str]:
    return [
        name for name, p in parameters.items() if any(matches(pattern, alias) for alias in p.names)
    ]


def _names_weight(pattern: str, name: str) -> bool:
    """Match "c_attn" or "attn.c_attn" to the weight of each module whose name ends so.

    With * or a dot also by fnmatch, to the name of the parameter or of its module.
    """
    if name == pattern or f".{name}".endswith(f".{pattern}.weight"):
        return True
    module = name.removesuffix(".weight")
    return ("*" in pattern or "." in pattern) and any(
        fnmatchcase(which, pattern) for which in {name, module}
    )


def _names_part(pattern: str, name: str) -> bool:
    """Match a plain name to any part of the path, so to all of a module's parameters."""
    if "*" in pattern or "." in pattern:
        return fnmatchcase(name, pattern)
    return pattern in name.split(".")


def _matches_nothing(
    pattern: str, names: Iterable[str], matches: Callable[[str, str], bool]
) -> str:
    """Say so, with the closest of what would have matched."""
    names = list(names)
    parts = {part for name in names for part in name.split(".") if not part.isdigit()}
    plain = [part for part in sorted(parts) if any(matches(part, name) for name in names)]
    candidates = names if "*" in pattern or "." in pattern else [*plain, *names]
    near = difflib.get_close_matches(pattern, candidates, n=3, cutoff=0.0)
    return f"matches no parameter; the closest names are {', '.join(near)}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _is_linear(parameter: Parameter, name: str) -> bool:
    """Tell the weight of linear layers and of nothing else: not one tied to an embedding."""
    linear = (isinstance(owner, nn.Linear) or is_conv1d(owner) for owner in parameter.owners)
    return name.split(".")[-1] == "weight" and all(linear)


def is_conv1d(module: nn.Module) -> bool:
    """Tell a transformers Conv1D without importing transformers."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)


def _input_dim(owner: nn.Module) -> int:
    return 0 if is_conv1d(owner) else 1
