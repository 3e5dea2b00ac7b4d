"""Peak memory of training, each time in a fresh process: a part of benchmark.py."""

import json
import subprocess
import sys
from functools import partial

from benchmark_contenders import (
    CONTENDERS,
    Settings,
    Times,
    gpt2,
    gpt2_config,
    interleave,
    tokens,
    train_step,
)
from peak_memory import peak_memory_of_this_process


def memory(s: Settings) -> Times:
    """Measure each contender in processes of its own, in turn."""
    names = [name for name in CONTENDERS if name != "frozen"]
    return interleave(
        {name: partial(_measure, name, s) for name in names}, s.repeats, 0, "peak memory"
    )


def _measure(name: str, s: Settings) -> dict[str, float]:
    job = json.dumps([name, s.model, s.ranks[0], s.batches[0]])
    done = subprocess.run([sys.executable, __file__, job], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process that trains {name} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def _train(name: str, model: dict[str, int], rank: int, size: list[int]) -> dict[str, float]:
    """Train three steps in this process; return its peak memory before and after them, in MB."""
    contender = CONTENDERS[name](gpt2(model), rank)
    before = peak_memory_of_this_process()
    for _ in range(3):
        train_step(contender, *tokens(gpt2_config(model), tuple(size)))
    return {"peak before training": before, "peak": peak_memory_of_this_process()}


if __name__ == "__main__":
    print(json.dumps(_train(*json.loads(sys.argv[1]))))
