"""What the processes of tests/test_sharded.py do, forked from one, which starts once."""

import os
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

import rosa_func
from forking import in_a_group
from models import checkpoint_segments, seeded, tiny_gpt2, token_ids
from references import relative_distance, state_bytes
from rosa_func import checkpoint, distributed, samplers, sparse
from rosa_func.module import RosaModule
from rosa_func.samplers import Site

TARGETS = ["c_attn", "c_proj", "c_fc"]
BOUND = 5  # seconds that a process waits for one that is gone
KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "exact": {"exact": True},
    "nf4": {"quantize": "nf4", "master": True},
    "nf4_double": {"quantize": "nf4_double", "master": True},
    "int8": {"quantize": "int8", "master": True},
}


def loss_of(model: torch.nn.Module, state: TensorDict, ids: Tensor) -> Tensor:
    logits = rosa_func.call(model, state, ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def whole_state(kind: str = "float32", model: torch.nn.Module | None = None) -> TensorDict:
    model = seeded(tiny_gpt2) if model is None else model
    state = rosa_func.init(model, 2, targets=TARGETS, train="ln_f", **KINDS[kind])
    return sparse.add(state, sparse.support_random(state, {"c_fc": 0.1}, key=0))


def trained(state: TensorDict, checkpointed: bool = False) -> list[Tensor]:
    """Return the losses of some steps, and the gradients of the last one."""
    model = seeded(tiny_gpt2)
    if checkpointed:
        options = {"use_reentrant": False, "context_fn": rosa_func.recompute}
        checkpoint_segments(model, options)
    leaves = rosa_func.named_parameters(state)
    optimizer = torch.optim.SGD(leaves.values(), 0.1)
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, state, token_ids(3, 8, seed=step))
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
    return [*losses, *(leaf.grad for leaf in leaves.values())]  # type: ignore[list-item]


def furthest(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(relative_distance(a, b) for a, b in zip(found, expected, strict=True))


def computed(mesh: DeviceMesh, kinds: Iterable[str]) -> dict[str, float]:
    """Return how far losses and gradients are from those of the whole state, by kind."""
    distances = {}
    for kind in kinds:
        state = whole_state(kind)
        sharded = distributed.shard(state.clone(), mesh)
        distances[kind] = furthest(trained(sharded), trained(state))
    return distances


def checkpointed(mesh: DeviceMesh) -> float:
    """Return how far losses and gradients are where each layer is computed again in backward."""
    return furthest(trained(whole_sharded(mesh), True), trained(whole_state()))


def held(mesh: DeviceMesh, kinds: Iterable[str]) -> dict[str, tuple[int, int, int]]:
    """Return by kind the bytes of a rank's rows, of all of them, and of the largest weight."""
    found = {}
    for kind in kinds:
        sharded = distributed.shard(whole_state(kind), mesh)
        leaves = sharded.items(include_nested=True, leaves_only=True)
        frozen: list[Any] = [t for path, t in leaves if hasattr(t, "device_mesh")]
        own = sum(t.to_local().nbytes for t in frozen)
        found[kind] = (own, sum(t.nbytes for t in frozen), max(t.nbytes for t in frozen))
    return found


def drawn(mesh: DeviceMesh, kinds: Iterable[str]) -> dict[str, Any]:
    """Return what becomes of states that are resampled, merged, and compared with the model."""
    decomposed: list[str] = []

    def counting(W: Tensor, r: int, site: Site) -> tuple[Tensor, Tensor]:
        decomposed.append(site.name)
        return samplers.random(W, r, site)

    same: dict[str, bool] = {}
    model = seeded(tiny_gpt2)
    for kind in kinds:
        state = whole_state(kind)
        state["trainable", "transformer.h.0.attn.c_attn.weight", "A"] += 0.1
        sharded = distributed.shard(state, mesh)
        same[f"gather, {kind}"] = state_bytes(distributed.gather(sharded)) == state_bytes(state)
        expected = rosa_func.resample(state, 1)
        decomposed.clear()
        new = distributed.resample(sharded, 1, sampler=counting)
        same[f"resample, {kind}"] = state_bytes(distributed.gather(new)) == state_bytes(expected)
        merged, weights = rosa_func.merge(new), rosa_func.merge(expected)
        full = {n: t.full_tensor() if hasattr(t, "device_mesh") else t for n, t in merged.items()}
        same[f"merge, {kind}"] = checkpoint.digest(full) == checkpoint.digest(weights)
        changes = [checkpoint.digest(checkpoint.delta(s, model)) for s in (new, expected)]
        same[f"delta, {kind}"] = changes[0] == changes[1]
    return {
        "same": same,
        "decomposed": list(decomposed),
        "adapted": list(state["input_dim"].keys()),
        "hash": distributed.check_equal(new),
    }


def in_a_module(rank: int, size: int, mesh: DeviceMesh) -> float:
    """Train a module of sharded weights under DDP; return how far it is from one process."""

    def steps(module: RosaModule, used: torch.nn.Module, share: Callable[[Tensor], Tensor]) -> None:
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for step in range(4):
            if step == 2:
                module.resample(step, optimizer=optimizer)
            optimizer.zero_grad()
            ids = share(token_ids(4, 8, seed=step))
            logits = used(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
            optimizer.step()

    model = seeded(tiny_gpt2)
    module = RosaModule(model, distributed.shard(whole_state(), mesh))
    steps(module, DistributedDataParallel(module), lambda ids: ids.tensor_split(size)[rank])
    found = distributed.gather(module.state.detach())
    alone = RosaModule(model, whole_state())
    steps(alone, alone, lambda ids: ids)
    pairs = (rosa_func.merge(s).values() for s in (found, alone.state.detach()))
    return furthest(*map(list, pairs))


def failing(rank: int, mesh: DeviceMesh) -> str:
    """Resample with a sampler that fails in one process."""

    def sampler(W: Tensor, r: int, site: Site) -> tuple[Tensor, Tensor]:
        if rank == 1:
            raise ValueError(f"no draw of {site.name}")
        return samplers.random(W, r, site)

    return said(lambda: distributed.resample(whole_sharded(mesh), 1, sampler=sampler))


def whole_sharded(mesh: DeviceMesh) -> TensorDict:
    return distributed.shard(whole_state(), mesh)


def said(work: Callable[[], object]) -> str:
    """Return what is raised, and that it took no longer than twice the bound."""
    start = monotonic()
    try:
        work()
        found = "nothing was raised"
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    return found if monotonic() - start < 2 * BOUND else f"after {monotonic() - start} s {found}"


def out_of_turn(rank: int, mesh: DeviceMesh, known: bool) -> str:
    """Compute with layers in another order on one process, after two passes if that is known."""
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64, bias=False) for _ in range(4)])
    weights = distributed.shard(rosa_func.init(model, 2), mesh)

    def forward(names: str) -> None:
        composed = rosa_func.compose(weights)
        x = torch.ones(3, 64)
        for name in names:
            x = torch.nn.functional.linear(x, composed[f"{name}.weight"])

    def work() -> None:
        for _ in range(2 if known else 0):
            forward("0123")
        forward("0123" if rank == 0 else "0231")

    return said(work)


def gone(rank: int, mesh: DeviceMesh) -> str:
    """End one process after a pass, and go on in the other."""
    state, model = whole_sharded(mesh), seeded(tiny_gpt2)
    loss_of(model, state, token_ids(3, 8))
    if rank == 1:
        os._exit(0)
    return said(lambda: loss_of(model, state, token_ids(3, 8)))


def shares(mesh: DeviceMesh, kinds: Iterable[str]) -> dict[str, Any]:
    return {work.__name__: work(mesh, kinds) for work in (held, computed, drawn)}


def process(rank: int, size: int, folder: Path) -> dict[str, Any]:
    mesh = dist.init_device_mesh("cpu", (size,))
    if size == 4:
        results = shares(mesh, ["nf4_double"])
        hybrid = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        results["hybrid"] = shares(hybrid, ["float32"])
        state = distributed.shard(whole_state(), hybrid)
        if rank == 3:
            state["frozen", "transformer.wte.weight"].to_local().add_(1)
        results["unequal"] = said(lambda: distributed.check_equal(state))
        return results
    results = shares(mesh, ["float32", "exact", "nf4_double"]) | {
        "checkpointed": checkpointed(mesh)
    }
    results["module"] = in_a_module(rank, size, mesh)
    results["failing"] = failing(rank, mesh)
    results["out of turn at first"] = out_of_turn(rank, mesh, known=False)
    # Each in a group of its own, since what fails half-way breaks its group.
    for name in ("out of turn", "gone"):
        group = dist.new_group(list(range(size)), timeout=timedelta(seconds=BOUND))
        own = DeviceMesh.from_group(group, "cpu")
        if name == "out of turn":
            results[name] = out_of_turn(rank, own, known=True)
            continue
        torch.save(results, folder / f"{rank}.pt")
        results[name] = gone(rank, own)
    return results


def saved(size: int, rank: int, folder: Path) -> None:
    """Do what is to be done in a group of that size, and save the results."""
    (folder / str(size)).mkdir(exist_ok=True)
    results = process(rank, size, folder / str(size))
    torch.save(results, folder / str(size) / f"{rank}.pt")


if __name__ == "__main__":
    for size in (2, 4):
        in_a_group(partial(saved, size), Path(sys.argv[1]), f"{size} ranks", size, timeout=60.0)
