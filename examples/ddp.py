"""ROSA under DistributedDataParallel: the processes share each resample.

    torchrun --nproc-per-node 2 examples/ddp.py [--short] [--cache DIR]

Adapts the base model of quickstart.py (trained once, and cached) to source code, with the batch
split over the processes. With gloo, so on CPUs; change the backend for others.
"""

import argparse
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from option_types import folder
from quickstart import (
    RATES,
    SHORT,
    TARGETS,
    Base,
    Budget,
    base_and_task,
    cached_base,
    mean_nll,
    progress,
    schedule,
    total_nll,
)
from torch.nn.parallel import DistributedDataParallel

import rosa_func
from rosa_func import distributed
from rosa_func.module import RosaModule


def main() -> None:
    """Read the command line and join the other processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a tiny model and a few dozen steps")
    parser.add_argument("--cache", type=folder, default="runs/quickstart", help="the base model's")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        sys.exit("start the processes with: torchrun --nproc-per-node 2 examples/ddp.py")
    base, budget = SHORT if args.short else (Base(), Budget())
    dist.init_process_group("gloo")
    # DDP's reducer must be gone before the group: else its end waits, with the interpreter's lock,
    # for a thread of gloo that may need this lock.
    try:
        adapt(base, budget, args.cache)
    except KeyboardInterrupt:
        if dist.get_rank() == 0:
            print("interrupted: a base model that was finished stays cached", file=sys.stderr)
        # At once: the end of the group would wait for processes that are ending themselves.
        os._exit(130)
    dist.destroy_process_group()


def adapt(base: Base, budget: Budget, cache: Path) -> None:
    """Train on this process's share of each batch, and report from the first."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        cached_base(base, cache)
    dist.barrier()
    model, task = base_and_task(cached_base(base, cache), base, budget)

    module = RosaModule(model, rosa_func.init(model, budget.rank, targets=TARGETS))
    distributed.check_equal(module.state)
    wrapped = DistributedDataParallel(module)
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.0)
    with progress(f"{size} processes", task, hidden=rank > 0) as bar:
        for epoch, batches in enumerate(schedule(task, RATES["rosa"])):
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
        nll = mean_nll(lambda ids: module(ids).logits, task.held_out)
        print(f"{size} processes, one state ({digest[:12]}): held-out ppl {math.exp(nll):.2f}")


if __name__ == "__main__":
    main()
