"""The parts of torch that are needed and have no public name, all in one place."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from operator import itemgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass as without_torch_function
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.autograd.graph import _engine_run_backward
from torch.nn.modules.conv import _ConvNd as Convolution
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "FOLLOWS_PARAMETERS_OF_A_SUBCLASS",
    "FORWARD_TABLES",
    "FSDP_MARK",
    "GROUPED_PRODUCTS",
    "STATE_DICT_HOOKS",
    "TENSOR_TABLES",
    "VALUE_OF",
    "VIEWED",
    "Convolution",
    "TorchDispatchMode",
    "address",
    "are_transforms_off",
    "backward",
    "base_of",
    "content_tables",
    "counting_writes",
    "hook_tables",
    "is_alias",
    "is_autocast",
    "is_compiled",
    "is_eager",
    "is_exporting",
    "is_fake",
    "is_old_dynamo",
    "is_only_holder",
    "is_traced",
    "is_wrapped",
    "is_wrapper",
    "memory_holders",
    "memory_of",
    "move",
    "move_by",
    "operator_name",
    "outside_transforms",
    "own_buffers",
    "own_modules",
    "own_parameters",
    "own_persistent_buffers",
    "own_tables",
    "tensor_holders",
    "timeout_of",
    "tree_leaves",
    "tree_map",
    "turn_into",
    "version",
    "without_autocast",
    "without_torch_function",
    "written",
]

# What FullyShardedDataParallel and fully_shard set on each module that they are given.
FSDP_MARK = "_is_fsdp_managed_module"


_VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
# Tried: 2.6 and 2.8, which do not follow all, and 2.11, 2.13 and 2.14, which do.
_HAS_OLD_DYNAMO = _VERSION < (2, 11)
# A compiler of torch 2.6 cannot; one of 2.8 can.
FOLLOWS_PARAMETERS_OF_A_SUBCLASS = _VERSION >= (2, 8)

# Products of groups of rows with a matrix each, under the names of this torch.
GROUPED_PRODUCTS: list[Callable[..., Tensor]] = [
    getattr(place, name)
    for place, name in ((torch, "_grouped_mm"), (torch.nn.functional, "grouped_mm"))
    if hasattr(place, name)
]


# A tensor of which another is a view. To go on asking for it ends only if each answer is its own.
VIEWED = Tensor._base.__get__  # type: ignore[union-attr]
# The operator by which code asks for the value of a tensor, as `.item()` and `if` do.
VALUE_OF = torch.ops.aten._local_scalar_dense.default


def operator_name(function: Any) -> str | None:
    """Return "library::operator" of an operator of torch.ops, None for other functions."""
    if isinstance(function, torch._ops.OpOverload):
        return function._schema.name
    return getattr(function, "_qualified_op_name", None)


def is_eager() -> bool:
    """Return False inside a compiler, a transform of torch.func, or forward-mode derivatives."""
    return not torch.compiler.is_compiling() and are_transforms_off()


def is_old_dynamo() -> bool:
    """Return whether dynamo of torch before 2.11 is tracing, which cannot follow all that we do.

    Not a property of a NamedTuple, and in 2.6 no new tensor of a subclass either.
    """
    return _HAS_OLD_DYNAMO and torch.compiler.is_compiling()


def is_fake() -> bool:
    """Return whether tensors are made without values: FakeTensorMode, and `torch.export` by it."""
    if torch.compiler.is_dynamo_compiling():
        return False
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def is_compiled(module: nn.Module) -> bool:
    """Return whether calls of a module are compiled, by its `compile` or by torch.compile."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def is_exporting() -> bool:
    """Return whether torch.export is at work, as far as this torch says so (2.6 does not)."""
    flag: bool = getattr(torch.compiler, "_is_exporting_flag", False)
    return flag


def is_traced() -> bool:
    """Return whether torch.jit.trace is at work."""
    if torch.compiler.is_dynamo_compiling():
        return False
    answer: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return answer


def are_transforms_off() -> bool:
    """Return False inside a transform of torch.func or forward-mode derivatives."""
    return torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0


def is_wrapper(tensor: Tensor) -> bool:
    """Return whether a tensor has no memory of its own, but is made of other tensors."""
    return hasattr(tensor, "__tensor_flatten__")


def version(tensor: Tensor) -> int:
    """Return how often a tensor was written to, as far as torch counts that."""
    return 0 if tensor.is_inference() else tensor._version


def is_wrapped(tensor: Tensor) -> bool:
    """Return whether a transform of torch.func, or forward mode, follows a tensor."""
    in_transform: bool = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return in_transform or forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def outside_transforms() -> AbstractContextManager[object]:
    """Return a context whose tensors no transform of torch.func follows."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return nullcontext()
    return temporarily_clear_interpreter_stack()


def memory_of(tensor: Tensor) -> Tensor:
    """Return the tensor that holds the values, under what transforms of torch.func put round it."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def is_alias(one: Tensor, other: Tensor) -> bool:
    """Return whether a write to one tensor is seen in another."""
    answer: bool = torch._C._is_alias_of(memory_of(one), memory_of(other))  # type: ignore[attr-defined]
    return answer


def address(tensor: Tensor) -> int:
    """Return where the memory of a tensor begins, 0 if it has none of its own."""
    if is_wrapper(tensor) or tensor.layout is not torch.strided:
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # of a transform, a mode, or a lazy module
        return 0


def memory_holders(tensor: Tensor) -> int:
    """Return how many tensors hold the memory of this one; 1 where this torch does not say."""
    return _holders_of_memory(tensor) - _MEMORY_ALONE + 1


def is_only_holder(tensor: Tensor) -> bool:
    """Return whether no other tensor has the memory of this one; False where torch does not say."""
    return hasattr(torch._C, "_storage_Use_Count") and memory_holders(tensor) == 1


def tensor_holders(tensor: Tensor) -> int:
    """Return how many hold a tensor itself: Python, and each graph that has to go back.

    1 where this torch does not say.
    """
    return _holders_of_tensor(tensor) - _TENSOR_ALONE + 1


def base_of(tensor: Tensor) -> Tensor | None:
    """Return what a tensor is a view of, None if it is none, or if others than views know that."""
    return None if _references_to_base(tensor) > _BASE_ALONE else VIEWED(tensor)


def _references_to_base(tensor: Tensor) -> int:
    base = VIEWED(tensor)
    return 0 if base is None else sys.getrefcount(base)


def _holders_of_memory(tensor: Tensor) -> int:
    storage, count = tensor.untyped_storage(), getattr(torch._C, "_storage_Use_Count", None)
    return 1 if count is None else count(storage._cdata)


def _holders_of_tensor(tensor: Tensor) -> int:
    count = getattr(tensor, "_use_count", None)
    return 1 if count is None else count()


# What is counted of a tensor that nothing else knows.
_MEMORY_ALONE = _holders_of_memory(torch.empty(1, device="cpu"))
_BASE_ALONE = _references_to_base(torch.empty(1, device="cpu").view(1))
_TENSOR_ALONE = _holders_of_tensor(torch.empty(1, device="cpu"))


def timeout_of(group: dist.ProcessGroup, device: torch.device) -> timedelta:
    """Return how long a collective of a group waits for the other ranks."""
    options: Any = group._get_backend(device).options
    timeout: timedelta = options._timeout
    return timeout


def turn_into(tensor: Tensor, kind: type[Tensor]) -> None:
    """Give a tensor another class; a parameter stays one."""
    is_parameter = isinstance(tensor, nn.Parameter)
    tensor.__class__ = kind
    if is_parameter:
        tensor._is_param = True


def written(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return what an operator of torch.ops writes to."""
    parameters = operator._schema.arguments
    given = {p.name: value for p, value in zip(parameters, args, strict=False)} | kwargs
    writes = [p.name for p in parameters if p.alias_info is not None and p.alias_info.is_write]
    return [given[name] for name in writes if name in given]


@contextmanager
def counting_writes() -> Iterator[None]:
    """Let torch count writes to the tensors that are made inside; in inference mode it does not."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def is_autocast(device: torch.device) -> bool:
    """Return whether autocast is on for a device; the meta device knows nothing of it."""
    if not torch._C._is_any_autocast_enabled():  # the usual answer, at once
        return False
    kind = device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which products have the dtype of what is multiplied."""
    return torch.autocast(device.type, enabled=False) if is_autocast(device) else nullcontext()


def move(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Do to a module's tensors what fn does: that is how modules are moved and cast."""
    module._apply(fn)  # type: ignore[no-untyped-call]


def move_by(module: nn.Module, function: Callable[..., nn.Module]) -> None:
    """Let function(module, fn, recurse=True) do what `move` does, for this module alone.

    A partial function is copied and pickled with its module.
    """
    vars(module)["_apply"] = partial(function, module)


def own_parameters(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the table of a module's own parameters, which may be written to."""
    return module._parameters  # type: ignore[return-value]


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the table of a module's own buffers, which may be written to."""
    return module._buffers


def own_tables(module: nn.Module) -> tuple[Any, Any]:
    """Return the two tables of a module's own tensors, None for one that it does not have yet."""
    return vars(module).get("_parameters"), vars(module).get("_buffers")


def own_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the table of a module's children."""
    return module._modules


# The tables of a module by their attributes: those of its tensors; the hooks that do not matter to
# a forward pass; and all that a forward pass may add to.
TENSOR_TABLES = frozenset({"_parameters", "_buffers"})
_TABLES = [key for key, value in nn.Module().__dict__.items() if isinstance(value, dict | set)]
STATE_DICT_HOOKS = frozenset(key for key in _TABLES if "state_dict" in key)
FORWARD_TABLES = [key for key in _TABLES if key not in STATE_DICT_HOOKS and key != "_modules"]
# A module's attributes to its tables of hooks, and to those of its parameters, buffers, children.
# By itemgetter, since they are asked for at each call.
hook_tables = itemgetter(*(key for key in FORWARD_TABLES if key.endswith("_hooks")))
content_tables = itemgetter("_parameters", "_buffers", "_modules")


def own_persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers of a module alone that its state dict holds."""
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Return attention as it is computed on a CPU, also on the meta device.

    There `scaled_dot_product_attention` itself takes a way that holds all scores.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out: Tensor = flash(q, k, v, 0.0, is_causal, attn_mask=mask)[0]
    return out


def backward(loss: Tensor) -> None:
    """Do `loss.backward()`, inside of the modes, for what checkpointing computes again."""
    options: dict[str, Any] = {"allow_unreachable": True, "accumulate_grad": True}
    _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), **options)
