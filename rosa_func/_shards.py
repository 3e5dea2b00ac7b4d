"""A state whose tensors are spread over processes, to a folder and back."""

import json
import os
from pathlib import Path as File
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor

from rosa_func._together import all_told
from rosa_func.files import container, shards
from rosa_func.files.shards import Index, Piece
from rosa_func.weight.gathering import is_sharded, rows_each
from rosa_func.weight.layout import Path, entries, from_entries
from rosa_func.weight.sharded import of_rows, spread_over


def save(folder: File, state: TensorDict, extra: dict[str, Any]) -> None:
    """Write the rows of this process, and in the first one all that is not spread."""
    rank, stem = dist.get_rank(), f"shards-{os.urandom(8).hex()}"
    rest, found = f"{stem}-rest.safetensors", entries(state)

    def write() -> tuple[str, dict[str, Piece]]:
        folder.mkdir(exist_ok=True)
        if rank == 0:
            whole = {path: tensor for path, tensor in found.items() if not is_sharded(tensor)}
            container.write(folder / rest, {"state": from_entries(whole), **extra})
        own = {_name(p): _own_rows(t) for p, t in found.items() if is_sharded(t) and _writes(t)}
        return rest, shards.write(folder / f"{stem}-{rank}.safetensors", own)

    told = all_told(write, "save", None)
    pieces: dict[str, list[Piece]] = {}
    for _, written in told:
        for name, piece in written.items():
            pieces.setdefault(name, []).append(piece)
    in_order = {name: sorted(each, key=lambda piece: piece.start) for name, each in pieces.items()}
    index = Index(told[0][0], [_name(path) for path in found], in_order)

    def end() -> None:
        if rank == 0:
            shards.write_index(folder, index)

    all_told(end, "save", None)


def load(folder: File, mesh: Any) -> tuple[TensorDict, dict[str, Any]]:
    """Read what `save` wrote: the rows of this process of a mesh, or the whole without one."""
    if mesh is None:
        return _read(folder, mesh)
    found: list[tuple[TensorDict, dict[str, Any]]] = []
    all_told(lambda: found.append(_read(folder, mesh)), "load", None)
    return found[0]


def _read(folder: File, mesh: Any) -> tuple[TensorDict, dict[str, Any]]:
    index = shards.read_index(folder)
    content = container.read(folder / index.rest)
    rest, like = entries(content.pop("state")), None if mesh is None else spread_over(mesh)
    found: dict[Path, Tensor] = {}
    for name in index.names:
        path = tuple(json.loads(name))
        if name not in index.shards:
            found[path] = rest[path]
        elif like is None:
            found[path] = shards.read_rows(folder, index, name, 0, index.rows(name))
        else:
            found[path] = _spread(folder, index, name, like)
    return from_entries(found), content


def _name(path: Path) -> str:
    return json.dumps(path)


def _own_rows(tensor: Any) -> tuple[int, Tensor]:
    """Return the first of this process's rows of a DTensor, and the rows."""
    place, count = _place_and_count(tensor.device_mesh, len(tensor))
    return min(place * count, len(tensor)), tensor.to_local()


def _writes(tensor: Any) -> bool:
    """Return whether this process is the first of those with the same rows."""
    return not any(tensor.device_mesh.get_coordinate()[:-1])


def _spread(folder: File, index: Index, name: str, like: Any) -> Tensor:
    """Return a DTensor, spread as `like`, of which this process reads its own rows alone."""
    mesh, length = like.device_mesh, index.rows(name)
    place, count = _place_and_count(mesh, length)
    start, stop = (min(end * count, length) for end in (place, place + 1))
    rows = shards.read_rows(folder, index, name, start, stop).to(mesh.device_type)
    found: Tensor = of_rows(rows, torch.Size([length, *rows.shape[1:]]), like)
    return found


def _place_and_count(mesh: Any, length: int) -> tuple[int, int]:
    """Return the place of this process along the rows, and how many each process has."""
    return mesh.get_coordinate()[-1], rows_each(length, mesh.size(mesh.ndim - 1))
