"""What it costs to gather sharded weights: a step of two ranks beside one with whole weights.

    python -m examples.benchmark.sharded             # about a minute on 2 cores
    python -m examples.benchmark.sharded --short     # a tiny model: does it run?

The model is a stack of square linear layers, float32, adapted at rank 16. Each rank is a process of
one thread, and they meet by gloo on this machine. A step is a forward and a backward pass of the
rank's own tokens; a gather is waited for where it does not end while something else computes.

    whole       every rank has all weights
    one by one  sharded, each weight gathered when it is needed
    ahead       sharded, the next weight gathered while one computes: as it is used

and the same with residuals in 4 bits. They take turns, in changing order; of each the fastest step
of the slowest rank counts, since whatever else the machine does only ever adds to a time.
"""

import argparse
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from tensordict import TensorDict
from torch import Tensor, nn

import rosa_func
from examples.shared.machine import cpu
from examples.shared.options import positive
from rosa_func import distributed
from rosa_func.weight import gathering

WAYS = ("whole", "one by one", "ahead")


class Settings(NamedTuple):
    """The size of a run."""

    layers: int
    width: int
    tokens: int
    rounds: int


class Cost(NamedTuple):
    """What a step takes on one rank, in seconds, and what the rank has."""

    step: float
    waiting: float
    frozen: int  # bytes


FULL, SHORT = Settings(12, 768, 512, 6), Settings(3, 64, 32, 2)


def main() -> None:
    """Read the command line, start the ranks, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a tiny model and two rounds")
    parser.add_argument("--ranks", type=positive, default=2)
    args = parser.parse_args()
    settings = SHORT if args.short else FULL
    with tempfile.TemporaryDirectory() as folder:
        work = (args.ranks, Path(folder), settings)
        multiprocessing.spawn(measured, work, nprocs=args.ranks)
        costs = torch.load(Path(folder) / "costs.pt", weights_only=True)
    print(f"{cpu()}; {args.ranks} ranks of one thread; {settings}\n")
    print(table({name: Cost(*cost) for name, cost in costs.items()}))


def measured(rank: int, ranks: int, folder: Path, settings: Settings) -> None:
    """Be one of the ranks; the first writes what all of them took."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, rank=rank, world_size=ranks)
    mesh = dist.init_device_mesh("cpu", (ranks,))
    torch.manual_seed(0)
    width = settings.width
    layers = [nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(settings.layers)]
    model = nn.Sequential(*layers)
    x = torch.randn(settings.tokens, width)
    states: dict[tuple[str, str], TensorDict] = {}
    for kind in ("float32", "nf4"):
        state = rosa_func.init(model, 16, quantize=None if kind == "float32" else kind)
        sharded = distributed.shard(state, mesh)
        states |= {(kind, way): state if way == "whole" else sharded.clone() for way in WAYS}
    waits = [0.0]
    gathering.Gather.end = waiting_counted(gathering.Gather.end, waits)  # type: ignore[method-assign]
    times: dict[tuple[str, str], list[tuple[float, float]]] = {name: [] for name in states}
    for turn in range(settings.rounds + 2):  # the first learns the order, the second follows it
        names = list(states)
        for kind, way in names[turn % len(names) :] + names[: turn % len(names)]:
            gathering.AHEAD = way == "ahead"
            waits[0] = 0.0
            dist.barrier()
            start = perf_counter()
            step(model, states[kind, way], x)
            times[kind, way].append((perf_counter() - start, waits[0]))
    own = [
        (*min(times[name][2:]), frozen_bytes(states[name])) for name in states
    ]  # the fastest step, and what it waited
    each: list[Any] = [None] * ranks
    dist.all_gather_object(each, own)
    if rank == 0:
        slowest = [max(costs) for costs in zip(*each, strict=True)]
        names = [f"{kind}, {way}" for kind, way in states]
        torch.save(dict(zip(names, slowest, strict=True)), folder / "costs.pt")
    dist.destroy_process_group()


def step(model: nn.Module, state: TensorDict, x: Tensor) -> None:
    """Compute a loss and its gradients."""
    leaves = rosa_func.parameters(state)
    loss = rosa_func.call(model, state, x).square().mean()
    torch.autograd.grad(loss, leaves)


def waiting_counted(end: Any, waits: list[float]) -> Any:
    """Return what ends a gather, and adds to a list how long that took."""

    def timed(gather: Any) -> list[Tensor]:
        start = perf_counter()
        wholes: list[Tensor] = end(gather)
        waits[0] += perf_counter() - start
        return wholes

    return timed


def frozen_bytes(state: TensorDict) -> int:
    """Return the bytes of the frozen part that a rank itself has."""
    frozen: Any = state["frozen"]
    leaves = frozen.values(include_nested=True, leaves_only=True)
    return sum((t.to_local() if hasattr(t, "to_local") else t).nbytes for t in leaves)


def table(costs: dict[str, Cost]) -> str:
    """Return a table in Markdown, each step beside that of whole weights."""
    lines = ["| weights | step | of whole | waiting for gathers | frozen, a rank |"]
    lines.append("|---|---|---|---|---|")
    for name, cost in costs.items():
        whole = costs[f"{name.partition(',')[0]}, whole"]
        share = "" if cost is whole else f"{cost.waiting / cost.step:.0%}"
        lines.append(
            f"| {name} | {1e3 * cost.step:.0f} ms | {cost.step / whole.step:.2f} | {share} | "
            f"{cost.frozen / 2**20:.1f} MiB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
