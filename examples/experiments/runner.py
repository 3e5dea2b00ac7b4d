"""Run the cells of an experiment that were not run yet, several at a time."""

import json
import multiprocessing
import os
import sys
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import base, plan, records

# Imported once, in the process that the others are forked from.
PRELOADED = [f"{__package__}.{name}" for name in ("training", "text", "generation", "glue")]


def run(
    experiment: plan.Experiment, data: Path | None, cache: Path, results: Path, jobs: int
) -> None:
    """Run until nothing is due. A kill loses the cells that were under way, and only these."""
    kind, _, name = experiment.setting.get("model", "").partition(":")
    if kind == "base":  # once, before the processes that would each make it
        base.cached(name, data, cache)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    steps = context.Value("l", 0)
    path, under_way = results / f"{experiment.name}.jsonl", results / "under-way"
    threads = max(1, (os.cpu_count() or 1) // jobs)
    running: dict[int, tuple[BaseProcess, plan.Cell]] = {}
    finished = 0
    with records.locked(path), tqdm(unit="step", desc=experiment.name, dynamic_ncols=True) as bar:
        under_way.mkdir(exist_ok=True)
        cells = records.read(results)
        try:
            while True:
                now = {cell.key for _, cell in running.values()}
                due = plan.due(experiment, records.scores(cells), cells)
                waiting = [cell for cell in due if cell.key not in now]
                while waiting and len(running) < jobs:
                    cell = waiting.pop(0)
                    # A fresh process for each cell, so that its peak memory is its own.
                    arguments = (cell, data, cache, under_way, steps, threads)
                    process = context.Process(target=_work, args=arguments)
                    process.start()
                    running[process.sentinel] = process, cell
                if not running:
                    break
                bar.total = finished + sum(cell.steps for cell in due) + _ahead(experiment, cells)
                bar.set_postfix(finished=len(cells), waiting=len(waiting), refresh=False)
                for sentinel in wait(list(running), timeout=1.0):
                    process, cell = running.pop(sentinel)
                    cells[cell.key] = _finished(process, cell, under_way)
                    records.append(path, cells[cell.key])
                    finished += cell.steps
                    bar.write(_said(cell, cells[cell.key][-1]), file=sys.stderr)
                bar.update(steps.value - bar.n)
        finally:
            for process, _ in running.values():
                process.kill()


def _ahead(experiment: plan.Experiment, cells: dict[str, Any]) -> int:
    """Return the steps of the published cells of methods whose rate is still searched for."""
    known = {cell.method for cell in plan.finals(experiment, records.scores(cells))}
    unknown = sum(method not in known for method in experiment.methods)
    return unknown * len(experiment.seeds) * experiment.setting["steps"]


def _work(
    cell: plan.Cell, data: Path | None, cache: Path, folder: Path, steps: Any, threads: int
) -> None:
    """Run a cell in a process of its own; its lines go to a file as they come."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch
    from transformers.utils import logging

    from . import task, training

    torch.set_num_threads(threads)
    torch.manual_seed(cell.seed)  # of dropout: this process runs nothing else
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    parent = os.getppid()

    def tick() -> None:
        if os.getppid() != parent:  # the runner was killed
            os._exit(1)
        with steps.get_lock():
            steps.value += 1

    def load() -> task.Task:
        return task.load(cell.setting, cell.seed, data, cache)

    with (folder / f"{cell.key}.jsonl").open("w", encoding="utf-8") as file:
        for line in training.run(cell, load, tick):
            file.write(json.dumps(line) + "\n")
            file.flush()


def _finished(process: BaseProcess, cell: plan.Cell, folder: Path) -> list[records.Line]:
    """Return the lines of a process that has ended."""
    process.join()
    path = folder / f"{cell.key}.jsonl"
    if process.exitcode:
        raise SystemExit(f"{cell.method.label}, rate {cell.rate:g}, seed {cell.seed} failed: above")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    path.unlink()
    return lines


def _said(cell: plan.Cell, end: records.Line) -> str:
    best = "diverged" if end["best"] is None else f"dev loss {end['best']:.4g}"
    where = f"{cell.method.label}, rate {cell.rate:g}, seed {cell.seed}, {cell.phase}"
    return f"{where}: {best} in {end['seconds']:.0f} s"
