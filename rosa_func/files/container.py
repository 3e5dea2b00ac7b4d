"""One safetensors file, written whole or not at all, and read with a checksum."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from rosa_func.extras import needs
from rosa_func.files import nested

_VERSION = 1
_KEYS = {"rosa_func", "content", "sha256"}


def write(path: Path, content: dict[str, Any]) -> None:
    """Write nested values; the file is replaced by a rename, after a sync to the disk.

    Raises:
        TypeError: if something cannot be written (its path is named).
        FileNotFoundError: if the folder is not there.
    """
    structure, tensors = nested.flatten(content)
    metadata = {"rosa_func": str(_VERSION), "content": structure}
    metadata["sha256"] = nested.digest(metadata, tensors)
    put(path, tensors, metadata)


def put(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors; the file is replaced whole."""
    with needs("checkpoint"):
        from safetensors.torch import save_file

    with replacing(path) as partial:
        save_file(_apart(tensors), partial, metadata)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a place for what is to replace a file: by a rename, after a sync to the disk."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """Return what `write` was given.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, altered, of a later version, or not one of `write`.
    """
    with needs("checkpoint"):
        from safetensors import SafetensorError

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        metadata, tensors = _read(path)
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
    if metadata.pop("sha256") != nested.digest(metadata, tensors):
        raise ValueError(f"{path} is damaged: its contents do not have the checksum that it names")
    try:
        content: dict[str, Any] = nested.unflatten(metadata["content"], tensors)
        content["state"]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold what its metadata says: {error!r}") from error
    return content


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(path, "pt", backend="pread") as file:  # not the file's mapped memory
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}


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
