"""Run the cells of an experiment that were not run yet, several at a time."""

import json
import math
import multiprocessing
import os
import signal
import sys
from datetime import UTC, datetime
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.experiments import plan, records, tasks


def unfinished(experiments: list[plan.Experiment], results: Path) -> list[plan.Experiment]:
    """Return the experiments of which a cell is due, and say of each other one that none is."""
    scores = records.scores(records.read(results))
    left = [experiment for experiment in experiments if plan.due(experiment, scores)]
    for experiment in experiments:
        if experiment not in left:
            cells = len(plan.done(experiment, scores))
            print(
                f"{experiment.name}: nothing is due, all {cells} cells are in {results}; "
                "--results DIR makes lines of your own"
            )
    return left


def run(
    experiment: plan.Experiment,
    data: Path | None,
    cache: Path,
    results: Path,
    jobs: int,
    cores: int = 0,
) -> None:
    """Run until nothing is due. After a kill, cells that were under way go on or start again.

    They go on from their last checkpoint, which they write some minutes apart. `cores` are those
    that all jobs share; 0 stands for the machine's.
    """
    cores = cores or os.cpu_count() or 1
    kind, _, name = experiment.setting.get("model", "").partition(":")
    if kind == "base":  # once, before the processes that would each make it
        from examples.experiments import base

        base.cached(name, data, cache)
    context = multiprocessing.get_context("forkserver")
    # Imported once, in the process that the others are forked from.
    context.set_forkserver_preload(
        [f"{__package__}.{name}" for name in ("training", *tasks.modules(experiment.setting))]
    )
    steps = context.Value("l", 0)
    path, under_way = results / f"{experiment.name}.jsonl", results / "under-way"
    running: dict[int, tuple[BaseProcess, plan.Cell]] = {}
    failed: dict[str, str] = {}
    taken, started = 0, datetime.now(UTC).isoformat(timespec="seconds")
    with (
        records.locked(results),
        tqdm(unit="step", desc=experiment.name, dynamic_ncols=True) as bar,
    ):
        under_way.mkdir(exist_ok=True)
        cells = records.read(results)
        try:
            while True:
                due = plan.due(experiment, records.scores(cells))
                now = {cell.key for _, cell in running.values()}
                waiting = [c for c in due if c.key not in now and c.key not in failed]
                while waiting and len(running) < (jobs if waiting[0].phase != "cost" else 1):
                    cell = waiting.pop(0)
                    threads = max(1, cores // (1 if cell.phase == "cost" else jobs))
                    # A fresh process for each cell, so that its peak memory is its own.
                    arguments = (cell, data, cache, under_way, steps, threads)
                    process = context.Process(target=_work, args=arguments)
                    process.start()
                    running[process.sentinel] = process, cell
                if not running:
                    break
                bar.total = taken + sum(cell.steps for cell in due) + _ahead(experiment, cells)
                bar.set_postfix(waiting=len(waiting), refresh=False)
                for sentinel in wait(list(running), timeout=1.0):
                    process, cell = running.pop(sentinel)
                    process.join()
                    taken += cell.steps
                    if process.exitcode:
                        failed[cell.key] = f"{_named(cell)}: exit code {process.exitcode}"
                        continue
                    cells[cell.key] = _finish(under_way / f"{cell.key}.jsonl", path, started)
                    bar.write(f"{_named(cell)}: {_said(cells[cell.key][-1])}", file=sys.stderr)
                bar.update(steps.value - bar.n)
        finally:
            for process, _ in running.values():
                process.kill()
    if failed:
        reasons = "\n".join(failed.values())
        raise SystemExit(f"{len(failed)} cells of {experiment.name} failed, see above:\n{reasons}")


def _ahead(experiment: plan.Experiment, cells: dict[str, Any]) -> int:
    """Return the steps of the published cells of methods whose rate is still searched for."""
    known = {cell.method for cell in plan.finals(experiment, records.scores(cells))}
    lengths = [method.length for method in experiment.methods if method not in known]
    return round(sum(lengths) * len(experiment.seeds) * experiment.setting["steps"])


def _work(
    cell: plan.Cell, data: Path | None, cache: Path, folder: Path, steps: Any, threads: int
) -> None:
    """Run a cell in a process of its own; its lines go to a file as they come."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the runner's to act on
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch
    from transformers.utils import logging

    from examples.experiments import task, tasks, training

    torch.set_num_threads(threads)
    torch.manual_seed(cell.seed)  # of dropout: this process runs nothing else
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    runner = multiprocessing.parent_process()  # os.getppid() would be the fork server
    assert runner is not None

    def check_runner() -> None:
        if not runner.is_alive():  # it was killed
            os._exit(1)

    def tick() -> None:
        check_runner()
        with steps.get_lock():
            steps.value += 1

    def load() -> task.Task:
        return tasks.load(cell.setting, cell.seed, data, cache)

    path, checkpoint = (folder / f"{cell.key}{suffix}" for suffix in (".jsonl", ".safetensors"))
    path.unlink(missing_ok=True)  # so that a worker of a killed runner writes to no file of ours
    with path.open("w", encoding="utf-8") as file:
        for line in training.run(cell, load, tick, checkpoint):
            check_runner()
            file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
            file.flush()
    checkpoint.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """Return the value with null for every number that JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _finish(path: Path, results: Path, run: str) -> list[records.Line]:
    """Move the lines of a cell that has ended to those of the experiment; the last has the run."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines[-1]["run"] = run
    records.append(results, lines)
    path.unlink()
    return lines


def _named(cell: plan.Cell) -> str:
    return f"{cell.method.label}, rate {cell.rate:g}, seed {cell.seed}, {cell.phase}"


def _said(end: records.Line) -> str:
    if "step_seconds" in end:
        return f"{end['step_seconds']:.3g} s a step, peak {end['peak_mib']:.0f} MiB"
    best = "diverged" if end["best"] is None else f"dev loss {end['best']:.4g}"
    return f"{best} in {end['seconds']:.0f} s"
