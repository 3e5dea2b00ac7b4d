"""A thin `nn.Module` around (model, state), for Trainer, accelerate and DistributedDataParallel."""

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from rosa_func import distributed, optim, samplers
from rosa_func._torch import own_buffers, own_modules, own_parameters
from rosa_func.forward import bind, call
from rosa_func.modules import skeleton
from rosa_func.samplers import Sampler
from rosa_func.weight import read
from rosa_func.weight.layout import (
    Path,
    entries,
    from_entries,
    is_compensation,
    leaves,
    trains,
)


class RosaModule(nn.Module):
    """A module whose parameters are the trainable leaves of a state.

        RosaModule(model, state)(*args, **kwargs) = call(model, state, *args, **kwargs)

    Its `forward` has the signature of the model's (Trainer drops the columns that it does not
    name), its `state_dict` is the whole state, and other attributes and methods (`config`,
    `generate`) are the model's, computed with the state. The model is not kept: a `skeleton` is.
    The trainable leaves are cloned, so neither the state nor the model is ever written to.

    Under DDP each process makes the module of the same state: DDP sends the parameters of the first
    to the others, but not the frozen part (see `distributed.check_equal`). Enable gradient
    checkpointing in the model (see `recompute`), not by Trainer's arguments.

    Args:
        model: the model, or its `skeleton`.
        state: a state of `init` or `resample`.

    Raises:
        KeyError, ValueError: at the first call, if the two do not fit.

    Example:
        >>> import rosa_func, torch
        >>> from rosa_func.module import RosaModule
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> module = RosaModule(model, rosa_func.init(model, 2))
        >>> optimizer = torch.optim.AdamW(module.parameters(), 1e-3, weight_decay=0.0)
        >>> module(torch.ones(3, 6)).sum().backward()
        >>> optimizer.step()
        >>> module.resample(key=1, optimizer=optimizer)
    """

    def __init__(self, model: nn.Module, state: TensorDict) -> None:
        """Take the leaves of the state as parameters, the rest of it as buffers."""
        super().__init__()
        read(state)  # or an error that names what is wrong
        self._slots: dict[Path, tuple[dict[str, Any], str]] = {}
        for path, value in entries(state).items():
            if trains(path):
                value = nn.Parameter(value.detach().clone())
            self._register(path, value)
        # Not a submodule: its parameters are on the meta device, and must not be listed.
        self.__dict__["skeleton"] = skeleton(model)
        self.train(model.training)
        self.__class__ = _class_for(type(model))  # type: ignore[arg-type]
        # Every rank has the frozen part from its own resample: nothing for DDP to broadcast.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]
        self.register_load_state_dict_pre_hook(RosaModule.into_new_memory)  # type: ignore[no-untyped-call]

    @property
    def state(self) -> TensorDict:
        """The state: its trainable leaves are the parameters themselves."""
        return from_entries({path: table[last] for path, (table, last) in self._slots.items()})

    def resample(
        self,
        key: int,
        *,
        sampler: Sampler = samplers.random,
        optimizer: torch.optim.Optimizer | None = None,
        moments: str = "reset",
        fraction: float | None = None,
    ) -> None:
        """Do `resample` in place: the same parameters get new values, so that hooks live on.

        Where torch.distributed is initialised, every process must call this, with the same key;
        each decomposes its share of the weights (see `distributed.resample`). The gradients of the
        factors are dropped, since they are those of the old ones: where several are accumulated for
        a step, resample before the first. An average of the parameters (`AveragedModel`, EMA) would
        mix subspaces from here on: average what `export.to_module(model, module.state)` returns.

        Args:
            key: as in `resample`.
            sampler: as in `resample`.
            optimizer: what trains the parameters, if it is to be rebound; see `optim.rebind`.
            moments: as in `optim.rebind`.
            fraction: as in `optim.rebind`.
        """
        old = self.state
        new = distributed.resample(old, key, sampler=sampler)
        if optimizer is not None:
            slots = optim.carried(optimizer, old, new, moments=moments, fraction=fraction)
            for name, parameter in leaves(old).items():
                optimizer.state.pop(parameter, None)
                if slots[name]:
                    optimizer.state[parameter] = slots[name]
        in_full = read(new).full
        for path, value in entries(new).items():
            table, last = self._slots[path]
            if trains(path):
                if path[1] not in in_full:
                    table[last].grad = None
                with torch.no_grad():
                    table[last].copy_(value)
            else:
                table[last] = value

    def train(self, mode: bool = True) -> "RosaModule":
        """Set the mode, of the skeleton too."""
        super().train(mode)
        self.__dict__["skeleton"].train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        """Find what is not here in the model; its methods compute with the state."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "skeleton" not in self.__dict__:
                raise
        model = self.__dict__["skeleton"]
        found = getattr(model, name)
        if name == "device":
            return next(self.parameters()).device
        # Methods that set the model up do not need the state, and must work where `bind` refuses.
        if not isinstance(found, MethodType) or "checkpointing" in name:
            return found

        @functools.wraps(found)
        def with_state(*args: Any, **kwargs: Any) -> Any:
            with bind(model, self.state):
                return found(*args, **kwargs)

        return with_state

    def _register(self, path: Path, value: Tensor) -> None:
        """Register a tensor under the model's own dotted name, in empty modules as branches."""
        *parents, last = [part for name in path for part in name.split(".")]
        branch: nn.Module = self
        for parent in parents:
            branch = own_modules(branch).setdefault(parent, nn.Module())  # type: ignore[assignment]
        is_parameter = isinstance(value, nn.Parameter)
        table: dict[str, Any] = own_parameters(branch) if is_parameter else own_buffers(branch)
        table[last] = value
        self._slots[path] = (table, last)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RosaModule":
        """Move what the state does not hold as well: the skeleton's non-persistent buffers."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module in self.__dict__["skeleton"].modules():
            buffers = own_buffers(module)
            for name, buffer in buffers.items():
                if buffer is not None and not buffer.is_meta:
                    buffers[name] = fn(buffer)
        return self

    def into_new_memory(self, given: dict[str, Any], prefix: str, *_: Any) -> None:
        """Let a state dict be loaded into memory that neither the state nor the model shares."""
        for path, (table, last) in self._slots.items():
            if trains(path):
                continue
            old, new = table[last], given.get(prefix + ".".join(path))
            # What rounding took has no elements while nothing was lost: the shape may be another.
            if (
                is_compensation(path)
                and isinstance(new, Tensor)
                and not (old.numel() and new.numel())
            ):
                table[last] = old.new_empty(new.shape)
            else:
                table[last] = old.clone()


@functools.cache
def _class_for(model_class: type[nn.Module]) -> type[RosaModule]:
    """Return RosaModule with the signature of the model's `forward`, which Trainer reads there."""

    def forward(self: RosaModule, *args: Any, **kwargs: Any) -> Any:
        return call(self.__dict__["skeleton"], self.state, *args, **kwargs)

    forward.__signature__ = inspect.signature(model_class.forward)  # type: ignore[attr-defined]
    forward.__doc__ = model_class.forward.__doc__
    return type(f"Rosa{model_class.__name__}", (RosaModule,), {"forward": forward})
