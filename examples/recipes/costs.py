"""What several ways to do one thing take, side by side: time and memory."""

import gc
from collections.abc import Callable

from examples.benchmark.contenders import clocked, interleave
from examples.shared.peak_memory import (
    give_back_freed_memory,
    peak_memory_of_this_process,
    reset_peak_memory,
)

Costs = dict[str, dict[str, float]]


def compared(work: dict[str, Callable[[], object]], rounds: int) -> Costs:
    """Run each once a round, in one process, and return the least of its costs over the rounds.

    The costs are "seconds"; "processor", the seconds of all threads, which a busy machine changes
    less; and, of three more runs, "MiB", by how much the memory of the process rises (0 where the
    system cannot say: it is Linux that can).
    """
    runs = {name: (lambda run=run: clocked(run)) for name, run in work.items()}
    gc.freeze()  # of all that is there now no garbage comes: a collection looks at the rest
    times = interleave(runs, rounds, warmup=1, label="rounds")
    costs = {
        name: {what: min(values) for what, values in found.items()}
        | {"MiB": min(_rise(work[name]) for _ in range(3))}
        for name, found in times.items()
    }
    gc.unfreeze()
    return costs


def table(costs: Costs, against: str) -> str:
    """Return the costs as text, with the times as shares of those of one of them."""
    unit = costs[against]
    lines = [f"{'':28}{'ms':>9}{'share':>7}{'CPU ms':>9}{'share':>7}{'MiB':>8}"]
    for name, cost in costs.items():
        times = "".join(
            f"{cost[what] * 1e3:>9.1f}{cost[what] / unit[what]:>7.2f}"
            for what in ("seconds", "processor")
        )
        lines.append(f"{name:28}{times}{cost['MiB']:>8.1f}")
    return "\n".join(lines)


def _rise(run: Callable[[], object]) -> float:
    """Return by how many MiB the memory rises in a run."""
    gc.collect()
    give_back_freed_memory()  # so that what is used again counts
    reset_peak_memory()
    before = peak_memory_of_this_process()  # what is held now, where the system says
    run()
    return max(peak_memory_of_this_process() - before, 0.0)
