"""Which weights are adapted, which are trained in full, and at what rank."""

import math
import sys
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from torch import Tensor, nn

from rosa_func._torch import Convolution
from rosa_func.defaults import backbone_and_head, linear_and_experts
from rosa_func.keys import canonical
from rosa_func.modules import Parameter, is_conv1d, parameters, some, tensors, unwrapped
from rosa_func.patterns import Named, Rank, listed, matches_nothing, rank, ranks, select
from rosa_func.weight import rounding

Predicate = Callable[[str, nn.Module], bool]

Targets = str | Iterable[str] | Predicate | None
_ALL_LINEAR = "all-linear"  # peft's word for the default


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


def plan(
    model: nn.Module,
    r: Rank | None,
    targets: Targets,
    train: str | Iterable[str],
    exclude: str | Iterable[str],
) -> Plan:
    """Resolve `r`, `targets`, `train` and `exclude` against the model, or say what is wrong."""
    named = {name: _with_plain_names(p) for name, p in parameters(model).items()}
    _refuse_max_norm(model)
    _refuse_peft(model)
    backbone, head = backbone_and_head(model, named)
    full = _full(named, listed(train, "train"), head)
    rest = [name for name in backbone if name not in set(full)]
    default, others = linear_and_experts(model, named, rest)
    wanted = _wanted(targets)
    chosen = _targeted(named, wanted, default)
    excluded = _chosen(_names(named), listed(exclude, "exclude"), "exclude")
    adapted = [name for name in chosen if name not in excluded]
    if not adapted and not full:
        raise ValueError(_why_nothing(model, wanted, chosen))
    if both := [name for name in adapted if name in set(full)]:
        raise ValueError(
            f"{some(both)} would be both adapted and trained in full; "
            "take it out of `targets` or out of `train`"
        )
    for name in [*adapted, *full]:
        refuse_dtype(name, named[name].value)
    _warn_of_frozen_head(model, head, {*adapted, *full})
    if not callable(wanted) and _ALL_LINEAR in wanted:
        _warn_of_others([name for name in others if name not in {*adapted, *excluded}])
    return Plan(
        names=list(tensors(model)),
        adapted=_ranked(r, {name: named[name] for name in adapted}),
        full=full,
    )


def _wanted(targets: Targets) -> Predicate | list[str]:
    if callable(targets) and not isinstance(targets, type):
        return targets
    return [_ALL_LINEAR] if targets is None else listed(targets, "targets")


def _names(named: dict[str, Parameter]) -> Named:
    return {name: parameter.names for name, parameter in named.items()}


def _why_nothing(model: nn.Module, wanted: Predicate | list[str], chosen: list[str]) -> str:
    if chosen:
        return f"exclude leaves nothing to adapt: it takes out {some(chosen)}, all of the targets"
    if wanted == [_ALL_LINEAR]:
        return (
            f"{type(model).__name__} has no nn.Linear or Conv1D weight to adapt; "
            "name the weights with targets=..."
        )
    return "targets is empty: name at least one weight, or pass None; or train=... alone"


def _ranked(r: Rank | None, adapted: dict[str, Parameter]) -> dict[str, Target]:
    if r is None:
        for name in adapted:
            raise TypeError(f"r is None: pass the rank of {name} and the other adapted weights")
        return {}
    each = ranks(r, _names(adapted))
    return {name: _target(each[name], name, parameter) for name, parameter in adapted.items()}


def _target(r: int | float, name: str, parameter: Parameter) -> Target:
    shape, owner = parameter.value.shape, parameter.owners[0]
    if shape.numel() == 0:
        raise ValueError(f"{name} is empty, of shape {tuple(shape)}: nothing to factor")
    if len(shape) == 2 or isinstance(owner, Convolution):
        matrix = (shape[0], math.prod(shape[1:]))
        return Target(rank(r, name, matrix), 0 if is_conv1d(owner) else 1)
    transposed = getattr(owner, "is_transposed", False) is True
    return Target(rank(r, name, (shape[-2], shape[-1])), -2 if transposed else -1)


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


def _warn_of_frozen_head(model: nn.Module, head: list[str], used: set[str]) -> None:
    # A language-model head comes with the pretrained weights; a task head starts at random.
    if not head or used & set(head) or unwrapped(model).get_output_embeddings() is not None:  # type: ignore[operator]
        return
    warnings.warn(
        f"the task head ({some(head)}) stays frozen at its values, which are random unless you "
        'loaded trained ones; pass train="head" to train it',
        stacklevel=4,
    )


def _warn_of_others(others: list[str]) -> None:
    if others:
        warnings.warn(
            f"{some(others)} of the backbone: frozen, since the default targets are the weights of "
            f"nn.Linear and Conv1D and of experts; name them beside {_ALL_LINEAR!r} in targets to "
            "adapt them, or in exclude",
            stacklevel=4,
        )


def _chosen(named: Named, patterns: list[str], argument: str) -> set[str]:
    """Return the parameters that the patterns mean, or say which of them means none."""
    chosen: set[str] = set()
    for pattern in patterns:
        found = select(named, pattern)
        if not found:
            raise ValueError(f"{pattern!r} in {argument} {matches_nothing(pattern, named)}")
        chosen.update(found)
    return chosen


def _full(named: dict[str, Parameter], train: list[str], head: list[str]) -> list[str]:
    """Return the names trained in full."""
    patterns = [pattern for pattern in train if pattern != "head" or not head]
    chosen = _chosen(_names(named), patterns, "train") | set(head if patterns != train else ())
    return [name for name in named if name in chosen]


def _targeted(
    named: dict[str, Parameter], wanted: Predicate | list[str], default: list[str]
) -> list[str]:
    """Return the names of the targets: those chosen that are matrices."""
    if callable(wanted):
        chosen = {name for name, p in named.items() if wanted(name, p.owners[0])}
        if not chosen:
            raise ValueError("the predicate given as targets chose no parameter")
        _refuse_vectors("the predicate given as targets", chosen, named)
    else:
        matrices = _names({name: p for name, p in named.items() if _is_matrix(name, p)})
        chosen = set(default if _ALL_LINEAR in wanted else ())
        for pattern in wanted:
            if pattern == _ALL_LINEAR:
                continue
            found = select(_names(named), pattern)
            if not found:
                near = matches_nothing(pattern, matrices)
                raise ValueError(f"{pattern!r} in targets {near}")
            _refuse_vectors(f"{pattern!r} in targets", found, named)
            chosen.update(found)
    return [name for name, p in named.items() if name in chosen and _is_matrix(name, p)]


def _is_matrix(name: str, parameter: Parameter) -> bool:
    """Return whether it can be factored; the biases of all experts of a layer are no matrix."""
    return parameter.value.ndim >= 2 and not name.endswith("bias")


def _with_plain_names(parameter: Parameter) -> Parameter:
    """Add the names without the prefixes of wrappers, for patterns to match."""
    plain = [canonical(name) for name in parameter.names]
    return parameter._replace(names=list(dict.fromkeys([*parameter.names, *plain])))


def _refuse_peft(model: nn.Module) -> None:
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    for name, module in model.named_modules() if tuners is not None else ():
        if isinstance(module, tuners.BaseTunerLayer):  # type: ignore[union-attr]
            raise TypeError(
                f"{name} is a layer of peft: pass the base model, or merge the adapter into it "
                "with merge_and_unload(), or turn it into a state with export.from_peft"
            )


def _refuse_vectors(who: str, found: Collection[str], named: dict[str, Parameter]) -> None:
    if not any(_is_matrix(name, named[name]) for name in found):
        shapes = some([f"{name} of shape {tuple(named[name].value.shape)}" for name in found])
        raise ValueError(
            f"{who} matches only {shapes}: a weight needs two dimensions to be factored; "
            "use train=... to train it in full"
        )
