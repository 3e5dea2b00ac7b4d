"""A folder of safetensors files, one of each process, and an index that names them.

The index is written last, by a rename, and names files that no earlier index named: a process that
is killed at any moment leaves the old checkpoint or the new one. torch.distributed.checkpoint has
its index in a pickle, which runs any code when it is loaded.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rosa_func.extras import needs
from rosa_func.files import container, nested

_INDEX, _VERSION = "index.json", 1


class Piece(NamedTuple):
    """Some rows of a tensor.

    Attributes:
        file: the name of the file that has them, under the name of the tensor.
        start: the first of the rows.
        rows: how many there are.
        sha256: of their dtype, shape and bytes.
    """

    file: str
    start: int
    rows: int
    sha256: str


class Index(NamedTuple):
    """What a folder holds.

    Attributes:
        rest: the name of the file, of `container`, with all that is not cut into pieces.
        names: of all tensors of the state, in its order.
        shards: {name: its pieces, in the order of their rows}.
    """

    rest: str
    names: list[str]
    shards: dict[str, list[Piece]]

    def rows(self, name: str) -> int:
        """Return how many rows a tensor has that is cut into pieces."""
        return sum(piece.rows for piece in self.shards[name])


def write(path: Path, rows: Mapping[str, tuple[int, Tensor]]) -> dict[str, Piece]:
    """Write rows of tensors, {name: (the first of them, they)}, and say what is where."""
    container.put(path, {name: tensor.detach() for name, (_, tensor) in rows.items()}, {})
    return {
        name: Piece(path.name, start, len(tensor), nested.digest({}, {name: tensor}))
        for name, (start, tensor) in rows.items()
    }


def write_index(folder: Path, index: Index) -> None:
    """Replace the index, and remove the files that it does not name."""
    content = json.dumps({"rosa_func": _VERSION, **index._asdict()})
    sealed = {"content": content, "sha256": _seal(content)}
    with container.replacing(folder / _INDEX) as partial:
        partial.write_text(json.dumps(sealed))
    named = {index.rest, *(piece.file for pieces in index.shards.values() for piece in pieces)}
    for path in folder.glob("shards-*.safetensors"):
        if path.name not in named:
            path.unlink()


def read_index(folder: Path) -> Index:
    """Return the index of a folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, or of a later version.
    """
    path = folder / _INDEX
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: no save into this folder has ended")
    try:
        sealed = json.loads(path.read_text())
        content, is_whole = sealed["content"], sealed["sha256"] == _seal(sealed["content"])
        version = json.loads(content)["rosa_func"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not of rosa_func.checkpoint.save: {error!r}") from error
    if not is_whole:
        raise ValueError(f"{path} is damaged: it does not have the checksum that it names")
    if version != _VERSION:
        raise ValueError(
            f"{path} is of version {version!r} and this rosa_func reads version {_VERSION}: update "
            "rosa_func"
        )
    found = json.loads(content)
    shards = {name: [Piece(*piece) for piece in each] for name, each in found["shards"].items()}
    return Index(found["rest"], found["names"], shards)


def read_rows(folder: Path, index: Index, name: str, start: int, stop: int) -> Tensor:
    """Return rows of a tensor; each piece of it that is read is checked.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if a file is damaged.
    """
    pieces = index.shards[name]
    found = [piece for piece in pieces if piece.start < stop and start < piece.start + piece.rows]
    cut = [
        _read(folder, name, piece)[max(start - piece.start, 0) : stop - piece.start]
        for piece in found or pieces[:1]  # no rows have a shape, too
    ]
    return torch.cat(cut) if len(cut) > 1 else cut[0].clone()


def _read(folder: Path, name: str, piece: Piece) -> Tensor:
    with needs("checkpoint"):
        from safetensors import SafetensorError, safe_open

    path = folder / piece.file
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}, which {folder / _INDEX} names")
    try:
        with safe_open(path, "pt", backend="pread") as file:
            tensor: Tensor = file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    if nested.digest({}, {name: tensor}) != piece.sha256:
        raise ValueError(f"{path} is damaged: {name} does not have the checksum of the index")
    return tensor


def _seal(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()
