"""What the processes of tests/test_sharded_checkpoint.py do."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import rosa_func
from forking import die, in_a_group
from models import seeded, tiny_gpt2
from rosa_func import checkpoint, distributed, samplers, sparse
from rosa_func.files import container, shards
from rosa_func.samplers import Site
from rosa_func.weight.gathering import is_sharded
from rosa_func.weight.layout import entries, trains


def dense() -> TensorDict:
    return rosa_func.init(seeded(tiny_gpt2).bfloat16(), 2, train="ln_f")


def quantised() -> TensorDict:
    return rosa_func.init(seeded(tiny_gpt2), 2, quantize="nf4_double", master=True)


def with_sparse_part() -> TensorDict:
    state = rosa_func.init(seeded(tiny_gpt2), 2)
    return sparse.add(state, sparse.support_random(state, 0.1, key=0))


STATES: dict[str, Callable[[], TensorDict]] = {
    "dense": dense,
    "quantised": quantised,
    "sparse": with_sparse_part,
}


def mesh_of(*sizes: int) -> Any:
    return init_device_mesh("cpu", sizes)


def saved_by_four(rank: int, folder: Path) -> None:
    for name, state in STATES.items():
        sharded = distributed.shard(state(), mesh_of(4))
        checkpoint.save(folder / name, sharded, step=7, random=torch.arange(3))
    checkpoint.save(folder / "hybrid", distributed.shard(dense(), mesh_of(2, 2)), step=7)


def loaded_by_two(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in (*STATES, "hybrid"):
        state, extra = checkpoint.load(folder / name, mesh_of(2))
        local = [tensor.to_local() for tensor in entries(state).values() if is_sharded(tensor)]
        found[name] = {
            "extra": extra["step"],
            "digest": checkpoint.digest(distributed.gather(state)),
            "rows": sum(tensor.numel() for tensor in local),
            "sharded": len(local),
            "held": sum(
                (tensor.to_local() if is_sharded(tensor) else tensor).nbytes
                for path, tensor in entries(state).items()
                if not trains(path)
            ),
        }
        checkpoint.save(folder / f"{name} again", state, step=8)
    return found


def killed(rank: int, folder: Path, victim: int) -> dict[str, Any]:
    """Save twice into one folder; the second time one process dies, the first before the index."""
    state = distributed.shard(dense(), mesh_of(2))
    run = folder / f"killed {victim}"
    checkpoint.save(run, state, step=1)
    if rank == victim == 0:
        shards.write_index = die
    if rank == victim == 1:
        container._sync = die
    try:
        checkpoint.save(run, state, step=2)
    except RuntimeError as error:
        return {"said": str(error)}
    return {"said": "nothing was raised"}


def read_into_shards(rank: int, folder: Path) -> dict[str, Any]:
    """Read a checkpoint of transformers into shards; and one that a process cannot split."""
    found: dict[str, Any] = {}
    for name, options in READ.items():
        _, state = rosa_func.init_from(folder / "gpt2", 2, mesh=mesh_of(2), **options)
        found[name] = checkpoint.digest(distributed.gather(state))
        local = [t.to_local() for t in entries(state).values() if is_sharded(t)]
        found[f"{name}, rows"] = sum(t.nbytes for t in local)

    def sampler(W: Tensor, r: int, site: Site) -> tuple[Tensor, Tensor]:
        if rank == 1:
            raise ValueError(f"no draw of {site.name}")
        return samplers.random(W, r, site)

    try:
        rosa_func.init_from(folder / "gpt2", 2, mesh=mesh_of(2), sampler=sampler)
    except (RuntimeError, ValueError) as error:
        found["failure"] = f"{type(error).__name__}: {error}"
    return found


READ: dict[str, dict[str, Any]] = {
    "float32": {"train": "ln_f"},
    "bfloat16": {"dtype": torch.bfloat16},
    "nf4": {"quantize": "nf4", "master": True},
}


def refused(rank: int, folder: Path) -> dict[str, str]:
    """Return what is raised where one process cannot write, or read, its part."""
    state, said = distributed.shard(dense(), mesh_of(2)), {}

    def attempt(what: str, work: Callable[[], object]) -> None:
        try:
            work()
            said[what] = "nothing was raised"
        except (RuntimeError, ValueError, TypeError, OSError) as error:
            said[what] = f"{type(error).__name__}: {error}"

    attempt("an extra", lambda: checkpoint.save(folder / "refused", state, extra=object()))
    attempt("no parent", lambda: checkpoint.save(folder / "none" / "refused", state))
    checkpoint.save(folder / "damaged", state)
    if rank == 0:
        (own,) = (p for p in (folder / "damaged").glob("shards-*-1.safetensors"))
        os.truncate(own, own.stat().st_size - 1)
    distributed.check_equal(TensorDict({}))  # both are here
    attempt("damaged", lambda: checkpoint.load(folder / "damaged", mesh_of(2)))
    return said


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    in_a_group(saved_by_four, folder, "saved", size=4)
    in_a_group(loaded_by_two, folder, "loaded")
    for victim in range(2):
        in_a_group(lambda rank, at, v=victim: killed(rank, at, v), folder, f"killed by {victim}")  # type: ignore[misc]
    in_a_group(refused, folder, "refused")
    seeded(tiny_gpt2).save_pretrained(folder / "gpt2")
    in_a_group(read_into_shards, folder, "read")
