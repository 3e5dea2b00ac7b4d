"""Save and load a state with whatever belongs to a run, in one safetensors file."""

import os
from pathlib import Path
from typing import Any

from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from rosa_func import tree
from rosa_func.change import apply_delta, delta

__all__ = ["apply_delta", "delta", "load", "save"]

_VERSION = 1
_KEYS = {"rosa_func", "content", "sha256"}


def save(path: str | os.PathLike[str], state: TensorDict, **extra: Any) -> None:
    """Write a state, or a `delta`, and anything that goes with it, to one safetensors file.

    The file is written beside its place, synced to the disk and renamed, so that a process
    killed at any moment leaves the old file or the new one (and perhaps a `.partial` file). A
    tensor that occurs twice is stored once. Needs the package safetensors; no pickle.

    Args:
        path: the file, by custom with the suffix `.safetensors`; an old one is replaced.
        state: a state of `init` or `resample`, or a `delta`.
        extra: what else a run needs: tensors, numbers, strings and None, nested in lists, tuples,
            dicts (of any such keys) and TensorDicts. So `optimizer.state_dict()`, a scheduler's,
            and `torch.get_rng_state()` can be passed as they are.

    Raises:
        TypeError: if the state is not a TensorDict, or extra holds anything else (its path is
            named). Nothing is written then.
        FileNotFoundError: if the folder is not there.

    Example:
        >>> import os, rosa_func, tempfile, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> state = rosa_func.init(model, 2)
        >>> optimizer = torch.optim.AdamW(rosa_func.parameters(state), weight_decay=0.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "run.safetensors")
        ...     rosa_func.checkpoint.save(path, state, optimizer=optimizer.state_dict(), step=7)
        ...     state, extra = rosa_func.checkpoint.load(path)
        >>> extra["step"]
        7
    """
    from safetensors.torch import save_file

    if not isinstance(state, TensorDictBase):
        raise TypeError(f"a state is a TensorDict, got {type(state).__name__}")
    structure, tensors = tree.flatten({"state": state, **extra})
    tensors = _apart(tensors)
    metadata = {"rosa_func": str(_VERSION), "content": structure}
    metadata["sha256"] = tree.digest(metadata, tensors)
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata)
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> tuple[TensorDict, dict[str, Any]]:
    """Read what `save` wrote, and check it.

    Args:
        path: the file.

    Returns:
        The state, on the CPU, without `requires_grad`, and a dict of the extras as they were.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, altered, of a later version, or not one of `save`.

    Example:
        See `save`.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, "pt", backend="pread") as file:  # memory of its own, not the file's
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    version = metadata.get("rosa_func", str(_VERSION))
    if version != str(_VERSION):
        raise ValueError(
            f"{path} is of version {version!r} and this rosa_func reads version {_VERSION}: "
            "update rosa_func, or the file is damaged"
        )
    if not metadata.keys() >= _KEYS:
        raise ValueError(
            f"{path} was not written by rosa_func.checkpoint.save: its metadata has "
            f"{sorted(metadata)}, not {sorted(_KEYS)}"
        )
    if metadata.pop("sha256") != tree.digest(metadata, tensors):
        raise ValueError(f"{path} is damaged: its contents do not have the checksum that it names")
    try:
        content = tree.unflatten(metadata["content"], tensors)
        return content.pop("state"), content
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold what its metadata says: {error!r}") from error


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make each contiguous and in memory of its own, as the format wants it."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result


def _sync(path: Path) -> None:
    """Wait until the disk has it; a folder cannot be opened on Windows, nor need it be."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
