"""A thin `nn.Module` around (model, state), for Trainer, accelerate and DistributedDataParallel."""

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NoReturn

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from rosa_func import averages, export, optim, samplers
from rosa_func._exchange import drawn_again
from rosa_func._torch import (
    FSDP_MARK,
    is_eager,
    is_exporting,
    move,
    own_buffers,
    own_modules,
    own_parameters,
)
from rosa_func.drawing import check_draw
from rosa_func.forward import call, called, check_fit
from rosa_func.modules import skeleton
from rosa_func.places import places
from rosa_func.samplers import Sampler
from rosa_func.stand_in import attribute, changes, refuse
from rosa_func.weight import read
from rosa_func.weight.donating import APART, handing_over
from rosa_func.weight.gathering import is_sharded
from rosa_func.weight.keeping import placed_like
from rosa_func.weight.layout import (
    Path,
    entries,
    from_entries,
    is_compensation,
    kept_apart,
    leaves,
    past_paths,
    trains,
)
from rosa_func.weight.sharing import shared_state


class RosaModule(nn.Module):
    """A module whose parameters are the trainable leaves of a state.

        RosaModule(model, state)(*args, **kwargs) = call(model, state, *args, **kwargs)

    Its class has the name of the model's, and its `forward` the signature (Trainer reads both); its
    `state_dict` is the whole state. Other attributes and methods (`config`, `generate`, submodules)
    are the model's, computed with the state; a submodule is a copy, of the values at that moment
    (see `adapted`). Methods that change the model (`resize_token_embeddings`) are refused: do it
    before `init`. `save_pretrained` and `push_to_hub` write the merged model.

    The model is not kept: a `skeleton` is. The trainable leaves and the model's buffers are cloned,
    and the rest when `state_dict` hands it out, so neither the state nor the model is ever written
    to. What a forward pass writes to persistent buffers (the statistics of BatchNorm) stays in the
    module's own, but `torch.compile` drops it; other buffers and attributes that it sets are
    dropped.

    In a SentenceTransformer it goes in the place of the model inside: `encoder[0].model =
    RosaModule(encoder[0].model, state)`; `save_pretrained` of the whole writes merged weights.

    It is no `PreTrainedModel`, so Trainer's checkpoints have the state, from which a run resumes,
    and no config.json: `save_pretrained(folder)` writes what `from_pretrained` loads.

    Under DDP each process makes the module of the same state: DDP sends the parameters of the first
    to the others, but not the frozen part (see `distributed.check_equal`). FSDP is refused, by a
    TypeError: see `distributed.shard`.

    Args:
        model: the model, or its `skeleton`.
        state: a state of `init` or `resample`.

    Raises:
        KeyError, ValueError: if the two do not fit, as in `call`.

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
        names = check_fit(model, state)  # or an error that names what is wrong
        buffers = {names[str(slot.name)] for slot in places(model).buffers}
        self._slots: dict[Path, tuple[nn.Module, str]] = {}  # whose tables may be replaced
        self._own: dict[Path, int] = {}
        for path, value in entries(state).items():
            value = value.detach()
            if trains(path):
                value = nn.Parameter(value.clone())
            elif path[1] in buffers:
                value = value.clone()
            self._register(path, value)
        # Not a submodule: its parameters are on the meta device, and must not be listed.
        inside = self.__dict__["skeleton"] = skeleton(model)
        own = {path[1]: slot for path, slot in self._slots.items()}
        self._buffer_slots = [own[names[str(slot.name)]] for slot in places(inside).buffers]
        self.train(model.training)
        self.__class__ = _class_for(type(model))  # type: ignore[arg-type]
        # Every rank has the frozen part from its own resample: nothing for DDP to broadcast.
        self._ddp_params_and_buffers_to_ignore = [
            ".".join(path) for path in self._slots if not trains(path) and path[1] not in buffers
        ]
        self.register_state_dict_pre_hook(RosaModule.into_own_memory)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(RosaModule.ready_to_load)  # type: ignore[no-untyped-call]

    @property
    def state(self) -> TensorDict:
        """The state: its trainable leaves are the parameters themselves."""
        return from_entries(
            {path: self._table(path)[last] for path, (_, last) in self._slots.items()}
        )

    @state.setter
    def state(self, new: TensorDict) -> None:
        """Take the values of a state with the same entries: the parameters stay the same objects.

        Their gradients, and what an optimizer knows of them, stay too, and are for the caller to
        drop where they are those of other values.
        """
        given = entries(new)
        own, may_differ = self.state, set(past_paths(new))
        before, after = (_shapes(each).items() for each in (entries(own), given))
        if other := {item for item in set(before) ^ set(after) if item[0] not in may_differ}:
            raise ValueError(
                "a RosaModule takes states whose entries have the names and shapes of its own, and "
                f"{'.'.join(min(other)[0])} differs: make a RosaModule of this state"
            )
        apart = kept_apart(new)
        self._follow_past(given)
        for path, value in given.items():
            table, last = self._table(path), self._slots[path][1]
            if trains(path):
                with torch.no_grad():
                    table[last].copy_(value)
            else:
                table[last] = value if path in apart else value.to(table[last].device)

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
        mix subspaces from here on: average what `export.to_module(model, module.state)` returns. A
        warning says so where a copy of the module was written to, as `AveragedModel` does; an
        average that is no copy of the module is not seen.

        The residuals are rewritten in their own memory, see `donate` of `resample`, unless a state
        or a model that is in use shares it.

        Args:
            key: as in `resample`.
            sampler: as in `resample`.
            optimizer: what trains the parameters, if it is to be rebound; see `optim.rebind`.
            moments: as in `optim.rebind`.
            fraction: as in `optim.rebind`.
        """
        if averages.have_begun(self):
            warnings.warn(
                "a copy of this RosaModule was written to since it was made: if it is an average "
                "of weights (AveragedModel, EMA), it would mix the factors of two subspaces after "
                "this resample. Average merged models, rosa_func.export.to_module(module.skeleton, "
                "module.state), or begin a new average after it",
                stacklevel=2,
            )
        check_draw(key, sampler)
        old = self.state
        shares = shared_state(old, *self.modules()) is not None
        with nullcontext(APART) if shares else handing_over("resample") as handover:
            # Of what trains in full it is the parameter that goes on.
            handover = handover._replace(leaf=lambda name, leaf: leaf.detach())
            new = drawn_again(old, key, sampler, handover)
            if optimizer is not None:
                slots = optim.carried(optimizer, old, new, moments=moments, fraction=fraction)
                for name, parameter in leaves(old).items():
                    optimizer.state.pop(parameter, None)
                    if slots[name]:
                        optimizer.state[parameter] = slots[name]
            in_full = read(old).full
            for name, parameter in leaves(old).items():
                if name not in in_full:
                    parameter.grad = None
            before = old
            if not set(past_paths(new)).isdisjoint(entries(new)):  # where nothing is handed over
                before = from_entries({p: _kept(p, t) for p, t in entries(old).items()})
            try:
                self.state = new
            except BaseException:  # Ctrl-C; what is old is given its values
                self.state = before
                raise

    def train(self, mode: bool = True) -> "RosaModule":
        """Set the mode, of the skeleton too."""
        super().train(mode)
        self.__dict__["skeleton"].train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        """Find what is not here in the model, where it computes with the state."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "skeleton" not in self.__dict__:
                raise
        model = self.__dict__["skeleton"]
        if changes(name) and hasattr(type(model), name):
            return functools.partial(refuse, name)
        if (name.startswith("save") or name == "push_to_hub") and hasattr(type(model), name):
            return functools.partial(self._on_merged, name)
        return attribute(model, name, lambda: self.state)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what the model has in the skeleton, which each call copies."""
        if name == FSDP_MARK:
            raise TypeError(
                "FSDP would shard what trains in a RosaModule, and leave all that is frozen whole "
                "on each rank. Shard the state instead, rosa_func.distributed.shard(state, mesh), "
                "make another RosaModule of it, and wrap that in DistributedDataParallel"
            )
        model = self.__dict__.get("skeleton")
        is_own = model is None or name in self.__dict__ or hasattr(type(self), name)
        if is_own or not hasattr(model, name):
            super().__setattr__(name, value)
        elif isinstance(value, nn.Module | Tensor):
            refuse(f"setting {name}")
        else:
            setattr(model, name, value)

    def apply(self, fn: Callable[[nn.Module], None]) -> NoReturn:
        """Refuse: there are no weights of the model to change."""
        refuse("apply")

    def __repr__(self) -> str:
        """Show the model."""
        return f"RosaModule({self.__dict__['skeleton']!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the class by the model's."""
        return _new, (type(self.__dict__["skeleton"]),), self.__dict__

    def __deepcopy__(self, memo: dict[int, Any]) -> "RosaModule":
        """Copy, and remember the copy: it may become an average (see `resample`)."""
        copied = memo[id(self)] = _new(type(self.__dict__["skeleton"]))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        averages.remember(self, copied)
        return copied

    def _on_merged(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the merged model, of this state or of a given `state_dict`."""
        state, given = self.state, kwargs.pop("state_dict", None)
        if given is not None:
            state = from_entries({path: given[".".join(path)] for path in self._slots})
        return getattr(export.to_module(self.__dict__["skeleton"], state), name)(*args, **kwargs)

    def _register(self, path: Path, value: Tensor) -> None:
        """Register a tensor under the model's own dotted name, in empty modules as branches."""
        *parents, last = [part for name in path for part in name.split(".")]
        branch: nn.Module = self
        for parent in parents:
            branch = own_modules(branch).setdefault(parent, nn.Module())  # type: ignore[assignment]
        is_parameter = isinstance(value, nn.Parameter)
        table: dict[str, Any] = own_parameters(branch) if is_parameter else own_buffers(branch)
        table[last] = value
        self._slots[path] = (branch, last)

    def _table(self, path: Path) -> dict[str, Any]:
        owner, _ = self._slots[path]
        return own_parameters(owner) if trains(path) else own_buffers(owner)

    def _follow_past(self, given: Mapping[Path, Tensor]) -> None:
        """Make room for past products of the shapes that are given, and for no others."""
        device = next(self.parameters()).device
        for path in past_paths(self.state):
            if path in given:
                self._register(path, torch.empty_like(given[path], device=device))
            elif path in self._slots:
                del self._table(path)[self._slots.pop(path)[1]]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RosaModule":
        """Move what the state does not hold as well: the skeleton's non-persistent buffers.

        A compensation that is kept apart from its weight stays where it is.
        """
        apart = {path: self._table(path)[self._slots[path][1]] for path in kept_apart(self.state)}
        for path in apart:
            self._table(path)[self._slots[path][1]] = None
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            for path, lost in apart.items():
                self._table(path)[self._slots[path][1]] = lost
        move(self.__dict__["skeleton"], fn)
        return self

    def _keep(self, buffers: list[Tensor]) -> None:
        """Take the buffers as a forward pass left them; they are clones."""
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                buffers = [buffer.clone() for buffer in buffers]
        for (owner, key), buffer in zip(self._buffer_slots, buffers, strict=True):
            own_buffers(owner)[key] = buffer

    def into_own_memory(self, *_: Any) -> None:
        """Let what `state_dict` hands out be written to: it is neither the state's nor the model's.

        Each tensor is copied once, and the old one let go, unless someone else holds it.
        """
        for path, (_owner, last) in self._slots.items():
            table = self._table(path)
            if not trains(path) and self._own.get(path) != _memory(table[last]):
                table[last] = placed_like(table[last], table[last].clone())
                self._own[path] = _memory(table[last])

    def ready_to_load(self, given: dict[str, Any], prefix: str, *_: Any) -> None:
        """Let a state dict be loaded into memory that neither the state nor the model shares."""
        self.into_own_memory()
        paths = [path for path in past_paths(self.state) if prefix + ".".join(path) in given]
        self._follow_past({path: given[prefix + ".".join(path)] for path in paths})
        for path, (_owner, last) in self._slots.items():
            table = self._table(path)
            old, new = table[last], given.get(prefix + ".".join(path))
            if not is_compensation(path) or not isinstance(new, Tensor):
                continue
            # It has no elements while nothing was lost, and another dtype in an earlier version.
            if old.dtype != new.dtype or not (old.numel() and new.numel()):
                table[last] = placed_like(old, old.new_empty(new.shape, dtype=new.dtype))


def _shapes(entries: dict[Path, Tensor]) -> dict[Path, torch.Size | None]:
    """Return the shapes; None of what rounding took, which may have no elements."""
    return {path: None if is_compensation(path) else t.shape for path, t in entries.items()}


def _memory(value: Any) -> int:
    """Return where the values that this process has begin."""
    own: Tensor = value.to_local() if is_sharded(value) else value
    return own.data_ptr()


def _kept(path: Path, value: Tensor) -> Tensor:
    """Return a tensor of a state whose values stay, while those that train are written over."""
    return value.detach().clone() if trains(path) else value


def _new(model_class: type[nn.Module]) -> RosaModule:
    """Return an object without attributes, for pickle and copies."""
    kind = _class_for(model_class)  # type: ignore[arg-type]
    return kind.__new__(kind)


# What Python looks up in the class alone.
_SPECIAL = ("__getitem__", "__len__", "__iter__", "__contains__")


@functools.cache
def _class_for(model_class: type[nn.Module]) -> type[RosaModule]:
    """Return RosaModule with the name of the model's class and the signature of its `forward`."""

    def forward(self: RosaModule, *args: Any, **kwargs: Any) -> Any:
        model = self.__dict__["skeleton"]
        if is_exporting():
            raise ValueError(
                "torch.export cannot follow a RosaModule: export the merged model, "
                "rosa_func.export.to_module(module.skeleton, module.state)"
            )
        if not is_eager():
            return call(model, self.state, *args, **kwargs)
        result, buffers = called(model, self.state, args, kwargs)
        self._keep(buffers)
        return result

    forward.__signature__ = inspect.signature(model_class.forward)  # type: ignore[attr-defined]
    forward.__doc__ = model_class.forward.__doc__
    members: dict[str, Any] = {"forward": forward}
    for name in _SPECIAL:
        if hasattr(model_class, name):
            members[name] = _special(name)
    return type(model_class.__name__, (RosaModule,), members)


def _special(name: str) -> Callable[..., Any]:
    def method(self: RosaModule, *args: Any) -> Any:
        return attribute(self.__dict__["skeleton"], name, lambda: self.state)(*args)

    return method
