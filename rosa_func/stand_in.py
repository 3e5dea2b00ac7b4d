"""What a `RosaModule` gives of its model: parts and methods that compute with a state."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any, NoReturn

from tensordict import TensorDict
from torch import nn

from rosa_func.forward import adapted, bind

# Methods that change a model's weights or structure, by the names that transformers has for them
# and that others took over from it.
_CHANGES = {
    *("_init_weights", "_initialize_weights", "init_weights", "initialize_weights", "post_init"),
    *("_resize_token_embeddings", "resize_token_embeddings", "resize_position_embeddings"),
    *("_tie_weights", "tie_weights", "tie_encoder_decoder", "tie_embeddings_and_encoder_decoder"),
    *("set_input_embeddings", "set_output_embeddings", "set_encoder", "set_decoder"),
    *("add_adapter", "load_adapter", "set_adapter", "delete_adapter", "enable_peft_hotswap"),
    *("enable_adapters", "disable_adapters", "prune_heads", "quantize", "dequantize"),
    *("to_bettertransformer", "reverse_bettertransformer"),
}
# What sets the model up, and so is done to the skeleton, which each call copies.
_SETTINGS = {
    *("enable_input_require_grads", "disable_input_require_grads", "add_model_tags"),
    *("set_attn_implementation", "set_experts_implementation", "set_use_kernels", "kernelize"),
}
# What leads to no weight, and is asked for often.
_DATA = {"config", "generation_config"}


def changes(name: str) -> bool:
    """Return whether a method of that name changes a model's weights or structure."""
    return name in _CHANGES


def refuse(name: str, *args: Any, **kwargs: Any) -> NoReturn:
    """Refuse to change the model by a method of that name."""
    raise TypeError(
        f"{name} would change the model, of which a RosaModule only has the state: use {name} on "
        "the model itself, then init and RosaModule"
    )


def attribute(model: nn.Module, name: str, state: Callable[[], TensorDict]) -> Any:
    """Return an attribute of the model as it is with the weights of a state.

    Args:
        model: the skeleton.
        name: of the attribute.
        state: gives the state; a method asks for it when it is called.

    Raises:
        AttributeError: if the model has none of that name.
        TypeError: if it is a module or function of a model that cannot be copied (see `adapted`).
    """
    if name in _DATA:
        return getattr(model, name)
    if name in _SETTINGS or "checkpointing" in name:
        return _setting(model, name)
    function = inspect.getattr_static(type(model), name, None)
    if isinstance(function, FunctionType):
        return _method(model, name, function, state)
    with _computing(model, state()) as used:
        found: Any = getattr(used, name)
    if used is model and callable(found):
        adapted(model, state())  # which says why not
    return found


def _setting(model: Any, name: str) -> Any:
    found = getattr(model, name)
    if not name.endswith("checkpointing_enable"):
        return found

    @functools.wraps(found)
    def enable(*args: Any, **kwargs: Any) -> None:
        found(*args, **kwargs)
        # Reentrant checkpointing gives no gradients where no input needs one, and embeddings are
        # frozen here. transformers before 5 leaves that to its caller.
        is_done = hasattr(model, "_require_grads_hook")
        if hasattr(model, "enable_input_require_grads") and not is_done:
            model.enable_input_require_grads()

    return enable


def _method(
    model: nn.Module, name: str, function: FunctionType, state: Callable[[], TensorDict]
) -> Callable[..., Any]:
    @functools.wraps(MethodType(function, model))
    def with_state(*args: Any, **kwargs: Any) -> Any:
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            used: Any = adapted(model, state())
            return getattr(used, name)(*args, **kwargs)
        with _computing(model, state()) as used:
            return getattr(used, name)(*args, **kwargs)

    return with_state


@contextmanager
def _computing(model: nn.Module, state: TensorDict) -> Iterator[Any]:
    """Yield the adapted model; if it cannot be copied, the model itself, bound for a while."""
    try:
        copy = adapted(model, state)
    except TypeError:
        with bind(model, state):
            yield model
        return
    yield copy
