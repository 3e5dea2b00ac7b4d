"""ROSA under DistributedDataParallel: the processes share each resample.

    python -m examples.ddp [--processes 2] [--short] [--cache DIR]
    torchrun --nproc-per-node 2 -m examples.ddp [--short] [--cache DIR]

Adapts the base model of the quickstart (trained once, and cached) to source code, with the batch
split over the processes. The first command starts them itself, on this machine; torchrun starts
them on several as well, and prints a traceback of its own when it is interrupted. With gloo, so on
CPUs; change the backend for others.
"""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import RLock

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import rosa_func
from examples.quickstart import RATES
from examples.shared.options import folder, positive
from examples.shared.small_gpt2 import (
    SHORT,
    TARGETS,
    Base,
    Budget,
    base_and_data,
    cached_base,
    perplexity,
    progress,
    schedule,
    total_nll,
)
from rosa_func import distributed
from rosa_func.module import RosaModule

INTERRUPTED = "interrupted: a base model that was finished stays cached"


def main() -> None:
    """Read the command line, and start the processes or, started by torchrun, be one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=positive, default=2, help="where torchrun starts none")
    parser.add_argument("--short", action="store_true", help="a tiny model and a few dozen steps")
    parser.add_argument("--cache", type=folder, default="runs/quickstart", help="the base model's")
    args = parser.parse_args()
    base, budget = SHORT if args.short else (Base(), Budget())
    if "RANK" not in os.environ:
        start(args.processes, base, budget, args.cache)
        return
    dist.init_process_group("gloo")
    try:
        adapt(base, budget, args.cache)
    except KeyboardInterrupt:
        if dist.get_rank() == 0:
            print(INTERRUPTED, file=sys.stderr)
        # At once: the end of the group would wait for processes that are ending themselves.
        os._exit(130)
    dist.destroy_process_group()


def start(size: int, base: Base, budget: Budget, cache: Path) -> None:
    """Start the processes and wait for them; Ctrl-C, which reaches all, is for this one to act on.

    A process that fails ends the others; its traceback is raised here.
    """
    processes: list[BaseProcess] = []
    try:
        cached_base(base, cache)  # here, since a process that is killed leaves half of it behind
        with tempfile.TemporaryDirectory() as meeting:
            work = (size, Path(meeting) / "store", base, budget, cache)
            with interrupted_afterwards():
                context = multiprocessing.spawn(joined, work, nprocs=size, join=False, daemon=True)
                processes += context.processes
            while not context.join():
                pass
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
            process.join()
        print(INTERRUPTED, file=sys.stderr)
        sys.exit(130)


@contextmanager
def interrupted_afterwards() -> Iterator[None]:
    """Put off a Ctrl-C to the end of the block. What is started in the block never hears of one."""
    resource_tracker.ensure_running()  # its start would unblock the signal again
    came = []
    usual = signal.signal(signal.SIGINT, lambda *_: came.append(True))  # another thread gets it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # processes inherit this
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, usual)
    if came:
        raise KeyboardInterrupt


def joined(rank: int, size: int, store: Path, base: Base, budget: Budget, cache: Path) -> None:
    """Be one of the processes that `start` starts; they meet in a file."""
    torch.set_num_threads(max(1, torch.get_num_threads() // size))
    tqdm.set_lock(RLock())  # of this process alone: a killed one would leave a shared one behind
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size)
    adapt(base, budget, cache)
    dist.destroy_process_group()


def adapt(base: Base, budget: Budget, cache: Path) -> None:
    """Train on this process's share of each batch, and report from the first.

    DDP's reducer must be gone before the group is destroyed: else the group's end waits, with the
    interpreter's lock, for a thread of gloo that may need this lock. So it is local to this.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        cached_base(base, cache)
    dist.barrier()
    _, model, data = base_and_data(base, budget, cache)

    module = RosaModule(model, rosa_func.init(model, budget.rank, targets=TARGETS))
    distributed.check_equal(module.state)
    wrapped = DistributedDataParallel(module)
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.0)
    with progress(f"{size} processes", data, hidden=rank > 0) as bar:
        for epoch, batches in enumerate(schedule(data, RATES["rosa"])):
            if epoch > 0:
                module.resample(epoch, optimizer=optimizer)
                distributed.check_equal(module.state)
            for ids, rate in batches:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                own = ids.tensor_split(size)[rank]
                # DDP averages over processes: each takes its share of the tokens' sum.
                loss = total_nll(wrapped(own, use_cache=False).logits, own)
                loss = loss * size / ids[:, 1:].numel()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                bar.set_postfix(loss=f"{loss.item():.3f}", rate=f"{rate:.1e}", cycle=epoch)
                bar.update(ids.numel())
    digest = distributed.check_equal(module.state)
    if rank == 0:
        ppl = perplexity(lambda ids: module(ids).logits, data.held_out)
        print(f"{size} processes, one state ({digest[:12]}): held-out ppl {ppl:.2f}")


if __name__ == "__main__":
    main()
