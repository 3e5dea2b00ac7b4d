"""ROSA under DistributedDataParallel: the processes share each resample.

    torchrun --nproc-per-node 2 examples/ddp.py [--short] [--cache DIR]

Adapts the base model of quickstart.py (trained once, and cached) to source code, with the batch
split over the processes. With gloo, so on CPUs; change the backend for others.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.distributed as dist
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
    """Parse the arguments and join the other processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a tiny model and a few dozen steps")
    parser.add_argument("--cache", type=Path, default="runs/quickstart", help="the base model's")
    args = parser.parse_args()
    base, budget = SHORT if args.short else (Base(), Budget())
    dist.init_process_group("gloo")
    # DDP's reducer must be gone before the group: else its end waits, with the interpreter's lock,
    # for a thread of gloo that may need this lock.
    adapt(base, budget, args.cache)
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
    with progress(f"rank {rank}", task) as bar:
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
