"""What the processes of tests/test_faults.py do: pairs forked from one, which starts once."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import rosa_func
from forking import die, in_a_group
from rosa_func import checkpoint, distributed, samplers
from rosa_func.files import container
from rosa_func.module import RosaModule
from rosa_func.samplers import Site

TIMEOUT, SILENT_FOR = 20.0, 1.0  # seconds: of a group, and of the group with one that waits


def layers() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Linear(6, 6) for _ in range(4)])


def a_state(**options: Any) -> TensorDict:
    return rosa_func.init(layers(), 2, **options)


def deadly(rank: int, after: int = 1) -> samplers.Sampler:
    """Return a sampler that kills rank 1 at a draw."""
    count = iter(range(after))

    def sampler(W: Tensor, r: int, site: Site) -> tuple[Tensor, Tensor]:
        if rank == 1 and next(count, None) is None:
            die()
        return samplers.projection(W, r, site)

    return sampler


def attempt(work: Callable[[], object], state: TensorDict) -> dict[str, Any]:
    """Return what is raised, when, and how far that moved the weights of a state."""
    before = {name: W.clone() for name, W in rosa_func.merge(state).items()}
    hashed = checkpoint.digest(state)
    start, said = time.monotonic(), "nothing was raised"
    try:
        work()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - start
    after = rosa_func.merge(state)
    return {
        "said": said,
        "seconds": seconds,
        "same bits": checkpoint.digest(state) == hashed,
        "moved": max(float((after[name] - W).abs().max()) for name, W in before.items()),
    }


def killed_in_a_step(rank: int, where: str) -> dict[str, Any]:
    """Take a step under DDP; die in the next one."""
    module = RosaModule(layers(), a_state())
    wrapped = DistributedDataParallel(module)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)

    def step() -> None:
        optimizer.zero_grad()
        wrapped(torch.ones(3, 6)).square().mean().backward()
        optimizer.step()

    step()
    if rank == 1 and where == "forward":
        module.register_forward_pre_hook(die)
    if rank == 1 and where == "backward":
        next(module.parameters()).register_hook(die)
    return attempt(step, module.state.detach())


def killed_in_a_resample(rank: int, donate: bool) -> dict[str, Any]:
    state = a_state()
    sampler = deadly(rank)
    return attempt(lambda: distributed.resample(state, 1, sampler=sampler, donate=donate), state)


def killed_while_sending(rank: int, donate: bool) -> dict[str, Any]:
    """Rank 1 dies before it sends the second of its tensors."""
    state, broadcast, count = a_state(), dist.broadcast, iter(range(8))

    def sending(*args: Any) -> None:
        if next(count, None) is None and rank == 1:
            die()
        broadcast(*args)

    dist.broadcast = sending
    return attempt(lambda: distributed.resample(state, 1, donate=donate), state)


def killed_in_the_resample_of_a_module(rank: int) -> dict[str, Any]:
    module = RosaModule(layers(), a_state())
    optimizer = torch.optim.AdamW(module.parameters(), 0.1)
    return attempt(
        lambda: module.resample(1, sampler=deadly(rank), optimizer=optimizer), module.state
    )


def killed_in_begin(rank: int, victim: int) -> dict[str, Any]:
    """The first dies while it scores, or the other before it takes part."""
    state = a_state()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        if rank == victim:
            die()
        return model(x).square().mean()

    if rank == victim == 1:
        die()
    return attempt(
        lambda: distributed.begin(layers(), state, [torch.ones(3, 6)], loss, 0.25), state
    )


def killed_in_a_save(rank: int, folder: Path) -> dict[str, Any]:
    """Rank 0 dies before its second file is on the disk, the other waits for it."""
    state, file = a_state(), folder / "run.safetensors"

    def save() -> None:
        if rank == 0:
            checkpoint.save(file, state, step=1)
            container._sync = die
            checkpoint.save(file, state, step=2)
        dist.barrier()

    return attempt(save, state)


def silent(rank: int) -> dict[str, Any]:
    """Rank 1 is there and does not take part."""
    state = a_state()
    if rank == 1:
        time.sleep(2.5 * SILENT_FOR)
        return {}
    return attempt(lambda: distributed.resample(state, 1), state)


def other(state: TensorDict, *path: str) -> TensorDict:
    """Return a state with another tensor at that path."""
    new = state.clone()
    new[path] = new[path] + 1
    return new


def without(state: TensorDict, branch: str) -> TensorDict:
    return TensorDict({name: value for name, value in state.items() if name != branch})


def disagreeing(rank: int) -> dict[str, Any]:
    """Return what comes of calls that are not the same in both processes, by what differs."""
    state, first = a_state(train="0.bias"), rank == 0
    of_rank = {
        "factors": state if first else other(state, "trainable", "1.weight", "A"),
        "residual": state if first else other(state, "frozen", "2.weight"),
        "in full": state if first else other(state, "trainable", "0.bias"),
        "targets": a_state(targets=["0", "1"] if first else ["0", "2"]),
        "number": a_state(targets=["0", "1"] if first else ["0"]),
        "rank": a_state() if first else rosa_func.init(layers(), 3),
        "dtype": state if first else rosa_func.init(layers().double(), 2, train="0.bias"),
        "an entry is missing": state if first else without(state, "input_dim"),
    }
    found = {
        f"resample, {what}": attempt(lambda s=s: distributed.resample(s, 1), whole(s, state))  # type: ignore[misc]
        for what, s in of_rank.items()
    }
    for what in ("factors", "residual"):
        s = of_rank[what].clone()  # that nothing else holds
        found[f"donated, {what}"] = attempt(
            lambda s=s: distributed.resample(s, 1, donate=True),  # type: ignore[misc]
            s,
        )
        module = RosaModule(layers(), s)
        found[f"module, {what}"] = attempt(lambda m=module: m.resample(1), module.state)  # type: ignore[misc]
    sampler = samplers.projection if first else samplers.random
    found["resample, key"] = attempt(lambda: distributed.resample(state, rank), state)
    found["resample, a key's type"] = attempt(
        lambda: distributed.resample(state, 1 if first else "1"),  # type: ignore[arg-type]
        state,
    )
    found["resample, sampler"] = attempt(
        lambda: distributed.resample(state, 1, sampler=sampler), state
    )
    for what in ("factors", "residual", "an entry is missing"):
        s = of_rank[what]
        found[f"begin, {what}"] = attempt(lambda s=s: begun(s), whole(s, state))  # type: ignore[misc]
    start = of_rank["factors"]
    found["begin, start"] = attempt(lambda: begun(state, start), state)
    found["begin, start in one"] = attempt(lambda: begun(state, state if first else None), state)
    on_meta = state if first else state.to("meta")
    found["check_equal, meta"] = attempt(lambda: distributed.check_equal(on_meta), state)
    return found


def whole(state: TensorDict, instead: TensorDict) -> TensorDict:
    """Return a state that can be merged: what lacks an entry cannot."""
    return state if "input_dim" in state else instead


def begun(state: TensorDict, start: TensorDict | None = None) -> TensorDict:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    return distributed.begin(layers(), state, [torch.ones(3, 6)], loss, 0.25, start=start)


def donated_in_one(rank: int) -> dict[str, Any]:
    """Donate in one process alone; return the hashes of both, and of a resample alone."""
    alone = rosa_func.resample(a_state(), 1)
    new = distributed.resample(a_state(), 1, donate=rank == 0)
    return {"together": distributed.check_equal(new), "alone": checkpoint.digest(alone)}


def sharded_by_others(rank: int) -> dict[str, str]:
    """Return what FSDP of either kind says of a RosaModule."""
    said = {}
    wraps: dict[str, Callable[[nn.Module], object]] = {
        "fully_shard": fully_shard,
        "FSDP": lambda module: FullyShardedDataParallel(module, device_id=torch.device("cpu")),
        "fully_shard, around": lambda module: fully_shard(nn.Sequential(module)),
    }
    for what, wrap in wraps.items():
        try:
            wrap(RosaModule(layers(), a_state()))
        except TypeError as error:
            said[what] = str(error)
    return said


WORKS: dict[str, Callable[[int, Path], dict[str, Any]]] = {
    "forward": lambda rank, _: killed_in_a_step(rank, "forward"),
    "backward": lambda rank, _: killed_in_a_step(rank, "backward"),
    "resample": lambda rank, _: killed_in_a_resample(rank, False),
    "resample, donated": lambda rank, _: killed_in_a_resample(rank, True),
    "sending": lambda rank, _: killed_while_sending(rank, False),
    "sending, donated": lambda rank, _: killed_while_sending(rank, True),
    "module": lambda rank, _: killed_in_the_resample_of_a_module(rank),
    "begin, first": lambda rank, _: killed_in_begin(rank, 0),
    "begin, other": lambda rank, _: killed_in_begin(rank, 1),
    "save": killed_in_a_save,
    "silent": lambda rank, _: silent(rank),
    "disagreeing": lambda rank, _: disagreeing(rank),
    "sharded by others": lambda rank, _: sharded_by_others(rank),
    "donated in one": lambda rank, _: donated_in_one(rank),
}


if __name__ == "__main__":
    for name, work in WORKS.items():
        timeout = SILENT_FOR if name == "silent" else TIMEOUT
        in_a_group(work, Path(sys.argv[1]), name, timeout=timeout)
