"""One cell: the same loop for every method, from the first evaluation to the test."""

import math
import platform
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from tensordict import TensorDict
from torch import nn

import rosa_func
from examples.experiments import resuming
from examples.experiments.adapting import Adaptation, cycle_starts
from examples.experiments.plan import Cell
from examples.experiments.records import Line
from examples.experiments.task import Task
from examples.shared import machine
from examples.shared.peak_memory import peak_memory_of_this_process, reset_peak_memory
from examples.shared.text import rate_at

WARM_UP = 3  # steps of a cost cell that are not timed


def run(
    cell: Cell,
    load: Callable[[], Task],
    tick: Callable[[], None] = lambda: None,
    checkpoint: Path | None = None,
) -> Iterator[Line]:
    """Yield the lines of a cell; `tick` is called after each step.

    A cell that trains goes on from its checkpoint, if it is there; the lines come from the first.
    """
    if cell.phase == "cost":
        lines = cost(cell, load, tick)
    else:
        lines = trained(cell, load, tick, checkpoint)
    for line in lines:
        yield {"cell": cell.key, **line}


def trained(
    cell: Cell, load: Callable[[], Task], tick: Callable[[], None], checkpoint: Path | None
) -> Iterator[Line]:
    """Train; score dev as often as the setting says, and test once where it is published."""
    setting, method = cell.setting, cell.method
    task = load()
    run = Adaptation(task, cell)
    at = resuming.load(checkpoint, run, {"event": "start", **_described(cell, task)})
    lines, seconds, loss, best, kept = list(at.lines), at.seconds, at.loss, at.best, at.kept
    yield from lines
    for _ in range(at.step):
        tick()
    stream = islice(task.batches(cell.seed), at.step, None)
    saved = time.monotonic()
    resamples = set(cycle_starts(method, cell.steps))
    rate = schedule(cell, resamples)
    for step in range(at.step, cell.steps + 1):
        if step == cell.steps or step % setting["eval_every"] == 0:
            if checkpoint and step > at.step and time.monotonic() - saved >= resuming.EVERY:
                done = resuming.Progress(step, seconds, loss, best, kept, lines)
                resuming.save(checkpoint, run, done)
                saved = time.monotonic()
            metrics: dict[str, Any] = dict(run.evaluate("dev"))
            loss += metrics["loss"]
            if math.isfinite(loss):
                if setting.get("spectrum") and cell.phase == "final":
                    metrics |= spectrum(task.model, run.state)
                lines.append({"event": "dev", "step": step, "seconds": seconds, **metrics})
                yield lines[-1]
                if metrics["loss"] < best:
                    best, kept = metrics["loss"], run.snapshot()
        if not math.isfinite(loss):
            yield {"event": "diverged", "step": step}
            break
        if step == cell.steps:
            break
        start = time.perf_counter()
        if method.budget and step == method.begin > 0:
            run.begin(step)
        if step in resamples:
            run.resample(step)
        loss = run.train(next(stream), rate(step))
        seconds += time.perf_counter() - start
        tick()
    end = {"event": "end", "trainable": run.trainable if cell.steps else 0}
    end |= {"seconds": seconds, "steps": step, "cycles": 1 + len(resamples)}
    end["best"] = best if math.isfinite(loss) else None
    if cell.phase == "final" and math.isfinite(loss):
        run.state = kept
        end["test"] = run.evaluate("test")  # the one time that it is touched
        if task.generate:
            end["generated"] = task.generate(rosa_func.export.to_module(task.model, run.state))
    yield end


def cost(cell: Cell, load: Callable[[], Task], tick: Callable[[], None]) -> Iterator[Line]:
    """Measure a few steps and one draw, alone on the machine: their time and peak memory."""
    reset_peak_memory()
    before = peak_memory_of_this_process()
    task = load()
    yield {"event": "start", **_described(cell, task)}
    run = Adaptation(task, cell)
    del task  # and with it the model: its weights are in the state
    stream, times = run.batches(cell.seed), []
    reset_peak_memory()
    for _ in range(WARM_UP + cell.steps):
        start = time.perf_counter()
        run.train(next(stream), 0.0)
        times.append(time.perf_counter() - start)
        tick()
    end = {"event": "end", "trainable": run.trainable, "best": None}
    end |= {"step_seconds": median(times[WARM_UP:]), "draw_seconds": 0.0}
    if cell.method.every:
        start = time.perf_counter()
        run.resample(0, donate=run.first is None)
        end["draw_seconds"] = time.perf_counter() - start
    yield end | {"peak_mib": peak_memory_of_this_process() - before}


def schedule(cell: Cell, resamples: Collection[int]) -> Callable[[int], float]:
    """Return the rate of a step: over the whole run a warm-up, then a linear fall to zero.

    It is the same for every method but those that also warm up after a resample.
    """
    usual = partial(rate_at, peak=cell.rate, warmup=cell.setting["warmup"], steps=cell.steps)
    return rosa_func.optim.rewarm(usual, resamples, cell.method.rewarm)


def spectrum(model: nn.Module, state: TensorDict) -> dict[str, Any]:
    """Return the singular values of the total change over the largest, the mean over weights.

    The rank counts those above 1e-3 of the largest; the effective rank is exp(entropy).
    """
    before = {name: p.detach() for name, p in model.named_parameters()}
    after = rosa_func.merge(state)
    matrices = [n for n, p in before.items() if p.ndim == 2 and "wte" not in n and "wpe" not in n]
    changes = {n: torch.linalg.svdvals(after[n] - before[n]) for n in matrices}
    # Below that it is the rounding of a merge, not a change.
    rows = [S / S[0] for n, S in changes.items() if S[0] > 1e-5 * before[n].norm()]
    if not rows:
        return {"rank": 0.0, "effective_rank": 0.0}
    shares = [S / S.sum() for S in rows]
    entropies = [-(p * p.clamp_min(1e-30).log()).sum() for p in shares]
    length = min(map(len, rows))
    mean = torch.stack([S[:length] for S in rows]).mean(0).tolist()
    return {
        "rank": sum(int((S > 1e-3).sum()) for S in rows) / len(rows),
        "effective_rank": sum(e.exp().item() for e in entropies) / len(rows),
        "spectrum": [float(f"{value:.3g}") for value in mean],
    }


def _described(cell: Cell, task: Task) -> dict[str, Any]:
    """Return what a reader of the line needs to run the cell again."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    versions["transformers"] = transformers.__version__
    return {
        "method": cell.method._asdict(),
        "rate": cell.rate,
        "seed": cell.seed,
        "phase": cell.phase,
        "setting": cell.setting,
        "data": task.digest,
        "versions": versions,
        "cpu": machine.cpu(),
        "threads": torch.get_num_threads(),
    }
