"""Peak memory of training, each time in a fresh process: a part of speed.py."""

import json
import sys
from functools import partial

from examples.benchmark.contenders import (
    CONTENDERS,
    Settings,
    Times,
    gpt2,
    gpt2_config,
    interleave,
    tokens,
    train_step,
)
from examples.benchmark.fresh_process import in_a_process
from examples.shared.peak_memory import peak_memory_of_this_process


def memory(s: Settings) -> Times:
    """Measure each contender in processes of its own, in turn."""
    names = [name for name in CONTENDERS if name != "frozen"]
    return interleave(
        {name: partial(_measure, name, s) for name in names}, s.repeats, 0, "peak memory"
    )


def _measure(name: str, s: Settings) -> dict[str, float]:
    job = json.dumps([name, s.model, s.ranks[0], s.batches[0]])
    return in_a_process("examples.benchmark.memory", job)


def _train(name: str, model: dict[str, int], rank: int, size: list[int]) -> dict[str, float]:
    """Train three steps in this process; return its peak memory before and after them, in MB."""
    contender = CONTENDERS[name](gpt2(model), rank)
    before = peak_memory_of_this_process()
    for _ in range(3):
        train_step(contender, *tokens(gpt2_config(model), tuple(size)))
    return {"peak before training": before, "peak": peak_memory_of_this_process()}


if __name__ == "__main__":
    print(json.dumps(_train(*json.loads(sys.argv[1]))))
