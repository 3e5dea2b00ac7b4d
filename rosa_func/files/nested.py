"""Nested values as JSON text and a flat dict of tensors, and back."""

import hashlib
import json
import math
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from rosa_func._torch import is_wrapper

_SCALARS = (type(None), bool, int, str)
# What of a value of a subclass is stored: the number or the string that it is.
_PLAIN: dict[type, Callable[[Any], Any]] = {
    str: str.__str__,
    int: int.__int__,
    float: float.__float__,
}
_MAPPINGS = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}


def flatten(value: Any) -> tuple[str, dict[str, Tensor]]:
    """Return the structure as JSON text and the tensors by their paths, each stored once.

    Raises a TypeError that names the path of what is neither a tensor, an array, a number, a
    string, a Path, None, nor a list, tuple, mapping or TensorDict of these. A number or a string of
    a subclass, such as `torch.__version__`, is stored as a plain one.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[Any, str] = {}

    def encode(value: Any, path: str) -> Any:
        if type(value) in _SCALARS:
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if type(value) is list:
            return [encode(item, f"{path}/{i}") for i, item in enumerate(value)]
        if type(value) is tuple:
            return {"tuple": [encode(item, f"{path}/{i}") for i, item in enumerate(value)]}
        if type(value) is torch.Size:
            return {"Size": list(value)}
        if type(value) is type(Path()):
            return {"Path": str(value)}
        if isinstance(value, np.generic) and _is_flat(value.dtype):
            return {"scalar": [value.dtype.str, value.tobytes().hex()]}
        if type(value) is np.ndarray and _is_flat(value.dtype):
            # As bytes, since torch lacks some of numpy's dtypes.
            data = np.array(value, order="C").reshape(-1).view(np.uint8)
            name = store(torch.from_numpy(data), path)
            return {"array": [value.dtype.str, list(value.shape), name]}
        if isinstance(value, Tensor):
            return {"tensor": store(value, path)}
        if isinstance(value, TensorDictBase):
            return {"TensorDict": pairs(value.items(), path), "batch": list(value.batch_size)}
        for tag, mapping in _MAPPINGS.items():
            if type(value) is mapping:
                return {tag: pairs(value.items(), path)}
        for kind, plain in _PLAIN.items():
            if isinstance(value, kind):
                return encode(plain(value), path)
        raise TypeError(
            f"{path} is of type {type(value).__name__}, which cannot be saved: pass tensors, numpy "
            "arrays of numbers or strings, numbers, strings, paths, None, and lists, tuples, dicts "
            "or TensorDicts of them"
        )

    def pairs(items: Any, path: str) -> list[Any]:
        return [
            [encode(key, f"{path}/key"), encode(item, f"{path}/{key}".lstrip("/"))]
            for key, item in items
        ]

    def store(tensor: Tensor, path: str) -> str:
        _refuse_wrapper(path, tensor)
        has_values = not (tensor.is_meta or tensor.is_quantized or tensor.is_nested)
        if not has_values or tensor.layout != torch.strided:
            raise TypeError(
                f"{path} is a tensor without values of its own (meta, sparse, nested or "
                "quantised): pass plain tensors"
            )
        tensor = tensor.detach().resolve_conj().resolve_neg()
        # One entry for the same memory seen the same way: states often share frozen tensors.
        memory = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
        key = (*memory, tensor.shape, tensor.stride(), tensor.dtype) if memory[0] else len(names)
        if key not in names:
            taken = path in tensors or path == "__metadata__"  # the format's own key
            names[key] = f"{path}#{len(tensors)}" if taken else path
            tensors[names[key]] = tensor
        return names[key]

    return json.dumps(encode(value, "")), tensors


def unflatten(text: str, tensors: dict[str, Tensor]) -> Any:
    """Return what `flatten` was given; a KeyError or ValueError if this is not its output."""

    def decode(value: Any) -> Any:
        if isinstance(value, list):
            return [decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "TensorDict" in value:
            return TensorDict(mapping(value["TensorDict"]), batch_size=value["batch"])
        ((tag, content),) = value.items()
        if tag == "float":
            return float(content)
        if tag == "tuple":
            return tuple(decode(item) for item in content)
        if tag == "tensor":
            return tensors[content]
        if tag == "Size":
            return torch.Size(content)
        if tag == "Path":
            return Path(content)
        if tag == "scalar":
            return np.ndarray((), content[0], bytes.fromhex(content[1]))[()]
        if tag == "array":
            dtype, shape, name = content
            return np.ndarray(shape, dtype, tensors[name].numpy())
        return _MAPPINGS[tag](mapping(content))

    def mapping(content: Any) -> dict[Any, Any]:
        return {decode(key): decode(item) for key, item in content}

    return decode(json.loads(text))


def _is_flat(dtype: "np.dtype[Any]") -> bool:
    """Return whether the bytes of an array are all of it: no Python objects, and no fields."""
    return not dtype.hasobject and dtype.fields is None and dtype.subdtype is None


def digest(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """Hash the metadata, and each tensor's name, dtype, shape and bytes."""
    shapes = {name: (str(t.dtype), list(t.shape)) for name, t in sorted(tensors.items())}
    hashed = hashlib.sha256(json.dumps([metadata, shapes], sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        _refuse_wrapper(name, tensor)
        hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def _refuse_wrapper(name: str, tensor: Tensor) -> None:
    if is_wrapper(tensor):
        raise TypeError(
            f"{name} is of type {type(tensor).__name__}, a tensor made of others (quantised or "
            "sharded), which has no bytes of its own to write: make it dense (a sharded state by "
            "rosa_func.distributed.gather), or save the change alone, with checkpoint.delta"
        )
