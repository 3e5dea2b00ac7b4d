"""Reading an nn.Module: its names, ties, buffers and shapes, and copying it without its weights."""

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rosa_func._torch import (
    FOLLOWS_PARAMETERS_OF_A_SUBCLASS,
    is_wrapper,
    move,
    move_by,
    own_buffers,
    own_modules,
    own_parameters,
    own_persistent_buffers,
)
from rosa_func.keys import unwrapped_names


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and the persistent buffers, a tied one once, under its first name."""
    return {name: tensor.detach() for name, tensor in own_tensors(model).items()}


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of `tensors` themselves."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is an nn.Module, got {type(model).__name__}")
    return dict(chain(model.named_parameters(), persistent_buffers(model)))


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that a state holds, a tied one once, under its first name."""
    seen = set()
    for prefix, module in model.named_modules():
        for name, buffer in own_persistent_buffers(module):
            if id(buffer) not in seen:
                seen.add(id(buffer))
                yield f"{prefix}.{name}" if prefix else name, buffer


class Parameter(NamedTuple):
    """One parameter of a model: the modules that own it, and every name it has."""

    value: Tensor
    owners: list[nn.Module]
    names: list[str]


def parameters(model: nn.Module) -> dict[str, Parameter]:
    """Return every parameter by its first name."""
    found: dict[int, Parameter] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, value in own_parameters(module).items():
            if value is not None:
                entry = found.setdefault(id(value), Parameter(value, [], []))
                entry.owners.append(module)
                entry.names.append(f"{prefix}.{name}" if prefix else name)
    return {name: found[id(value)] for name, value in model.named_parameters()}


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """Return every name of each tensor of `tensors`."""
    named = {name: parameter.names for name, parameter in parameters(model).items()}
    return named | {name: [name] for name, _ in persistent_buffers(model)}


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of torch.compile, DDP and their like."""
    while (inside := own_modules(model)).keys() in ({"_orig_mod"}, {"module"}):
        (inner,) = inside.values()
        if inner is None or list(own_parameters(model)):
            break
        model = inner
    return model


def is_conv1d(module: nn.Module) -> bool:
    """Return whether it is a transformers Conv1D, without importing transformers."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)


def refuse_meta(model: nn.Module) -> None:
    """Refuse a model without weights."""
    if meta := [name for name, p in model.named_parameters() if p.is_meta]:
        raise ValueError(f"{some(meta)} is on the meta device: load the weights first")


def refuse_int8(model: nn.Module) -> None:
    """Refuse weights whose layer reads what no state holds: a state is made of tensors alone."""
    for name, p in model.named_parameters():
        if type(p).__name__ == "Int8Params":
            raise TypeError(
                f"{name} is an Int8Params of bitsandbytes, whose layer reads more of it than its "
                "values: load the model without load_in_8bit (layers in 4 bits may stay frozen "
                "beside adapted ones)"
            )


def refuse_wrapper(name: str, tensor: Tensor) -> None:
    """Refuse to split or train a tensor that is made of others."""
    if is_wrapper(tensor):
        raise TypeError(
            f"{name} is of type {type(tensor).__name__}, a tensor made of others (quantised or "
            "sharded): it can stay frozen, but be neither adapted nor trained in full; name others "
            "in targets and train, or load the model without it"
        )


def refuse_sparse_gradients(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse 16-bit embeddings that are trained in full and ask for sparse gradients."""
    own = parameters(model)
    for name in names:
        p = own[name]
        is_sparse = any(getattr(owner, "sparse", False) is True for owner in p.owners)
        if is_sparse and p.value.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"{name} is the {p.value.dtype} weight of an embedding with sparse=True, and it is "
                "trained as a float32 tensor, whose gradient is dense: set sparse=False"
            )


def some(names: list[str]) -> str:
    """Name the first three."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def skeleton(model: nn.Module) -> nn.Module:
    """Return a weightless copy of the model, so that the model can be let go.

    Its parameters and persistent buffers are on the meta device, ties kept; non-persistent
    buffers, which no state holds, are real. `call(skeleton(model), state, ...)` equals
    `call(model, state, ...)` bit for bit.

    Move it as a model, and the state with it:

        model, state = model.to(device), state.to(device)

    Of a skeleton that moves the buffers. Its parameters stay on the meta device; their `device`,
    and so `model.device` of transformers, is the one to which it was moved, at first the model's
    (from torch 2.8 on; before, it is meta).

    Args:
        model: any `nn.Module`.

    Returns:
        A module of the same class. To compute with it, pass it to `call` with a state. Its
        `to_empty` raises a ValueError, since it would fill the buffers with anything.

    Example:
        >>> import rosa_func, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> state, x = rosa_func.init(model, 2), torch.ones(3, 6)
        >>> y = rosa_func.call(model, state, x)
        >>> model = rosa_func.skeleton(model)
        >>> torch.equal(rosa_func.call(model, state, x), y)
        True
    """
    weightless = {name: _weightless(p) for name, p in model.named_parameters()}
    buffers = {name: _on_meta(buffer) for name, buffer in persistent_buffers(model)}
    copied = _copied(model, weightless, buffers)
    for module in copied.modules():
        move_by(module, _move)  # and no subclass does it: the class is the model's
        vars(module)["to_empty"] = _refuse_to_empty
    return copied


def with_tensors(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of the model with these in the place of its own tensors, ties kept."""
    named = model.named_parameters()
    parameters = {name: nn.Parameter(values[name], p.requires_grad) for name, p in named}
    return _copied(model, parameters, values)


def _copied(
    model: nn.Module, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> nn.Module:
    # deepcopy takes what the memo holds instead of copying it: no weight is ever copied, and one
    # stand-in for a tensor under several names keeps the tie.
    stand_ins: dict[int, Any] = {id(p): parameters[name] for name, p in model.named_parameters()}
    stand_ins |= {id(buffer): buffers[name] for name, buffer in persistent_buffers(model)}
    # What a forward pass left in a module, such as the weight of a pruned layer: without its graph.
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                stand_ins[id(value)] = value.detach().clone()
    return copy.deepcopy(model, stand_ins)


class Weightless(nn.Parameter):
    """A parameter of a skeleton: on the meta device, under the device of what it stands for."""

    place: torch.device

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device to which the skeleton was moved."""
        return self.place

    def __deepcopy__(self, memo: dict[int, Any]) -> "Weightless":
        """Copy the place too."""
        copied = memo[id(self)] = _at(self.place, self.data, self.requires_grad)
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle the place too."""
        return _at, (self.place, self.data, self.requires_grad)


def _at(place: torch.device, data: Tensor, requires_grad: bool) -> Weightless:
    parameter = Weightless(data, requires_grad)
    parameter.place = place
    return parameter


def _weightless(p: nn.Parameter) -> nn.Parameter:
    """Return what stands for a parameter. One that has no device yet will come from a file."""
    data = _on_meta(p)
    if not FOLLOWS_PARAMETERS_OF_A_SUBCLASS:
        return nn.Parameter(data, p.requires_grad)
    place = torch.device("cpu") if p.device.type == "meta" else p.device
    return _at(place, data, p.requires_grad)


def _on_meta(tensor: Tensor) -> Tensor:
    """Return what stands for a tensor, which may be a spent one."""
    if is_wrapper(tensor):
        return tensor.detach().to("meta")
    return torch.empty_like(tensor, device="meta")


def _move(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Move or cast a module of a skeleton."""
    for child in module.children() if recurse else ():
        move(child, fn)
    for parameter in own_parameters(module).values():
        if parameter is not None and parameter.is_meta:
            place = getattr(parameter, "place", None)
            moved = fn(torch.empty(0, dtype=parameter.dtype, device=place))
            parameter.data = parameter.data.to(moved.dtype)
            if isinstance(parameter, Weightless):
                parameter.place = moved.device
    buffers = own_buffers(module)
    for name, buffer in buffers.items():
        if buffer is not None and not buffer.is_meta:
            buffers[name] = fn(buffer)
    return module


def _refuse_to_empty(*_: Any, **__: Any) -> None:
    raise ValueError(
        "a skeleton has no weights to fill, and to_empty would fill its buffers with anything: "
        "move it by model.to(device), and its state by state.to(device)"
    )


def fit(
    model: str, expected: Mapping[str, torch.Size], given: Mapping[str, torch.Size]
) -> dict[str, str]:
    """Return {the model's name: the state's name}, after making sure that all shapes fit.

    The names are the same but for what wrappers put in front of them (torch.compile, DDP).

    Raises:
        KeyError: if a name is in only one of the two.
        ValueError: if a shape differs (both are named).
    """
    if expected.keys() == given.keys():
        names = {name: name for name in expected}
    else:
        rest = unwrapped_names(given)
        names = {name: rest.pop(plain, "") for plain, name in unwrapped_names(expected).items()}
        if missing := [name for name, own in names.items() if not own]:
            raise KeyError(f"the state lacks {missing[0]} of {model}; was it made from this model?")
        if rest:
            raise KeyError(
                f"the state has {next(iter(rest.values()))}, and {model} has no tensor of that "
                "name; was it made from this model?"
            )
    for name, shape in expected.items():
        if shape != given[names[name]]:
            raise ValueError(
                f"{names[name]} has shape {tuple(given[names[name]])} in the state and "
                f"{tuple(shape)} in {model}"
            )
    return names
