"""What `init` and `resample` take above what is resident, pure and donated: a table.

    python -m examples.benchmark.donation [--short]

GPT-2 medium by its configuration, r = 16, each figure in a fresh process.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import GPT2LMHeadModel

import rosa_func
from examples.benchmark.contenders import gpt2_config
from examples.benchmark.fresh_process import in_a_process
from examples.shared.peak_memory import (
    give_back_freed_memory,
    memory_of_this_process,
    peak_memory_of_this_process,
    reset_peak_memory,
)
from rosa_func import samplers

RANK = 16
MEDIUM = {"n_layer": 24, "n_embd": 1024, "n_head": 16}
TINY = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 512}
DTYPES = ("float32", "bfloat16")


def measured(work: Callable[[], Any]) -> dict[str, float]:
    """Return what was resident before, the peak above it, and the time."""
    gc.collect()
    give_back_freed_memory()  # or what was let go before would be used again
    before, start = memory_of_this_process(), time.perf_counter()
    reset_peak_memory()
    result = work()
    seconds = time.perf_counter() - start
    above = peak_memory_of_this_process() - before
    del result
    return {"before": before, "above": above, "seconds": seconds}


def init(sizes: dict[str, int], dtype: str, sampler: str, donate: bool) -> dict[str, float]:
    """Measure `init` in this process."""
    model, options = built(sizes, dtype), options_of(sampler)
    return measured(lambda: rosa_func.init(model, RANK, donate=donate, **options))


def resample(sizes: dict[str, int], dtype: str, sampler: str, donate: bool) -> dict[str, float]:
    """Measure `resample` in this process."""
    options = options_of(sampler)
    state = rosa_func.init(built(sizes, dtype), RANK, donate=True, **options)
    return measured(lambda: rosa_func.resample(state, 1, donate=donate, **options))


def built(sizes: dict[str, int], dtype: str) -> torch.nn.Module:
    """Build a GPT-2 in that dtype from the beginning."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        return GPT2LMHeadModel(gpt2_config(sizes))
    finally:
        torch.set_default_dtype(default)


def options_of(sampler: str) -> dict[str, Any]:
    """Return the options; what LAPACK needs once, which is not the function's, is there then."""
    torch.linalg.eigh(torch.eye(64))
    return {"sampler": getattr(samplers, sampler)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a tiny model")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        what, *rest = json.loads(args.work)
        print(json.dumps({"init": init, "resample": resample}[what](*rest)))
        return
    sizes = TINY if args.short else MEDIUM
    print(f"torch threads: {torch.get_num_threads()}; MiB above what was resident, and seconds")
    for dtype in DTYPES:
        for what in ("init", "resample"):
            for sampler in ("random", "projection"):
                line = f"{dtype:9} {what:9} {sampler:11}"
                for donate in (False, True):
                    job = json.dumps([what, sizes, dtype, sampler, donate])
                    got = in_a_process("examples.benchmark.donation", "--work", job)
                    name = "donated" if donate else f"resident {got['before']:6.0f}  pure"
                    line += f"  {name} {got['above']:6.0f} {got['seconds']:6.1f} s"
                print(line, flush=True)


if __name__ == "__main__":
    main()
