"""The harness: what is equal for all methods, the lines, and runs that are killed."""

import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples.experiments import adapting, outcomes, plan, records, report, task, training
from small_experiment import METHODS, RATES, SETTING, RecordingTask, experiment

ROOT = Path(__file__).parents[1]


def lines_of(method: plan.Method, phase: str = "final") -> tuple[RecordingTask, list[records.Line]]:
    seen = RecordingTask()
    cell = plan.Cell(SETTING, method, 1e-2, 3, phase)
    return seen, list(training.run(cell, seen.load))


class TestFairness:
    @pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
    def test_every_method_trains_on_the_same_batches_in_the_same_order(self, method):
        seen, lines = lines_of(method)
        expected = [
            batch for batch, _ in zip(RecordingTask().load().batches(3), range(7), strict=False)
        ]
        own = [b for b in seen.batches if any(torch.equal(b, e) for e in expected)]
        assert len(own) == 7
        assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))
        looks = method.budget and method.support == "gradient"
        if method.sampler not in ("aligned", "importance") and not looks:
            assert len(seen.batches) == 7  # the others also look at a gradient when they draw
        assert lines[-1]["steps"] == 7

    @pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
    def test_dev_is_scored_at_the_same_steps_and_test_once(self, method):
        seen, lines = lines_of(method)
        assert [line["step"] for line in lines if line["event"] == "dev"] == [0, 3, 6, 7]
        assert seen.splits == {"dev": 4, "test": 1}

    def test_a_search_for_the_rate_does_not_touch_test(self):
        seen, lines = lines_of(METHODS[2], "tune")
        assert set(seen.splits) == {"dev"}
        assert "test" not in lines[-1]

    def test_all_methods_share_one_schedule_except_where_rewarming_is_compared(self):
        def rates(method: plan.Method) -> list[float]:
            cell = plan.Cell(SETTING, method, 0.5, 0, "final")
            rate = training.schedule(cell, set(adapting.cycle_starts(method, 7)))
            return [rate(step) for step in range(7)]

        usual = rates(METHODS[0])
        assert usual == pytest.approx([0.25, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1])
        assert all(rates(method) == usual for method in METHODS[:5])
        assert rates(METHODS[5]) == pytest.approx(
            [0.25, 0.5, 0.5, 0.4 / 3, 0.3 * 2 / 3, 0.2, 0.1 / 3]
        )

    def test_the_test_score_is_of_the_weights_that_were_best_on_dev(self):
        seen = RecordingTask()
        made = seen.load()
        order = iter([3.0, 1.0, 2.0, 4.0])  # of dev; the second is at step 3
        states: list[Tensor] = []

        def evaluate(forward: task.Forward, split: str) -> task.Metrics:
            states.append(forward(torch.ones(1, 6)).detach())
            return {"loss": next(order) if split == "dev" else 0.0}

        cell = plan.Cell(SETTING, METHODS[2], 1e-2, 3, "final")
        list(training.run(cell, lambda: made._replace(evaluate=evaluate)))
        assert torch.equal(states[4], states[1])
        assert not torch.equal(states[4], states[3])

    def test_dropout_is_on_in_training_and_off_in_scores(self):
        modes: list[tuple[str, bool]] = []
        made = RecordingTask().load()

        class Noted(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = made.model

            def forward(self, x: Tensor) -> Tensor:
                modes.append(("grad" if torch.is_grad_enabled() else "no grad", self.training))
                return self.layers(x)

        cell = plan.Cell(SETTING, METHODS[2], 1e-2, 3, "final")
        list(training.run(cell, lambda: made._replace(model=Noted())))
        assert set(modes) == {("grad", True), ("no grad", False)}

    def test_a_run_that_diverges_is_not_scored_however_well_it_began(self):
        made = RecordingTask().load()
        steps = iter([1.0, 1.0, 1.0, 1.0, math.nan])

        def loss(forward: task.Forward, batch: Tensor) -> Tensor:
            return made.loss(forward, batch) * next(steps)

        cell = plan.Cell(SETTING, METHODS[1], 1e-2, 3, "final")
        lines = list(training.run(cell, lambda: made._replace(loss=loss)))
        assert [line["event"] for line in lines] == ["start", "dev", "dev", "diverged", "end"]
        assert "test" not in lines[-1]
        assert records.scores({cell.key: lines}) == {cell.key: math.inf}

    def test_a_cost_cell_times_the_steps_and_the_draw_and_scores_nothing(self):
        for method in (METHODS[0], METHODS[2]):
            seen = RecordingTask()
            made = seen.load()

            def loss(forward: task.Forward, batch: Tensor, made: task.Task = made) -> Tensor:
                torch.ones(2**25)  # 128 MiB that a step holds for a while
                return made.loss(forward, batch)

            torch.ones(2**26)  # a peak from before is not the cell's
            cell = plan.Cell(SETTING, method, 1e-2, 3, "cost")
            lines = list(training.run(cell, lambda made=made, loss=loss: made._replace(loss=loss)))
            assert not seen.splits
            assert len(seen.batches) == plan.COST_STEPS + training.WARM_UP
            assert lines[-1]["step_seconds"] > 0 and lines[-1]["peak_mib"] >= 0
            assert (lines[-1]["draw_seconds"] > 0) == (method.every > 0)

    def test_every_method_searches_one_grid(self):
        cells = [plan.tuning(experiment(), method) for method in METHODS]
        assert all([cell.rate for cell in of] == RATES for of in cells)
        assert {cell.seed for of in cells for cell in of} == {9}

    def test_trainable_values_are_those_of_the_optimizer(self):
        values = {method.name: lines_of(method)[1][-1]["trainable"] for method in METHODS}
        assert values["full"] == 6 * 5 + 5 + 5 * 4 + 4
        matrices = plan.Method("matrices", "full", train="matrices")
        assert lines_of(matrices)[1][-1]["trainable"] == 6 * 5 + 5 * 4
        assert values["LoRA"] == values["ROSA"] == 2 * (6 + 5 + 5 + 4)
        assert values["aligned"] == 2 * (5 + 4)  # the output side alone


class TestLines:
    def line(self, cell: str, event: str, **fields: Any) -> records.Line:
        return {"cell": cell, "event": event, **fields}

    def test_only_finished_cells_are_read(self, tmp_path):
        whole = [
            self.line("a", "start"),
            self.line("a", "dev", loss=3.0),
            self.line("a", "end", best=2.0),
        ]
        records.append(tmp_path / "x.jsonl", whole)
        records.append(
            tmp_path / "x.jsonl", [self.line("b", "start"), self.line("b", "dev", loss=1)]
        )
        assert records.read(tmp_path) == {"a": whole}
        assert records.scores(records.read(tmp_path)) == {"a": 2.0}

    def test_a_torn_line_is_cut_off_and_the_cell_runs_again(self, tmp_path):
        path = tmp_path / "x.jsonl"
        whole = [self.line("a", "start"), self.line("a", "end")]
        records.append(path, whole)
        before = path.read_bytes()
        for torn in (b'{"cell": "b", "ev', b'{"cell": "b", "event": "start"}\n{"cell"'):
            path.write_bytes(before + torn)
            with records.locked(tmp_path):
                assert records.read(tmp_path) == {"a": whole}
            assert path.read_bytes().startswith(before)

    def test_published_lines_are_compressed_and_a_run_adds_to_them(self, tmp_path):
        """As text they outweighed the code (5.2 MB); a second part is joined to the first."""
        cells = {name: [self.line(name, "start"), self.line(name, "end")] for name in "abc"}
        path = tmp_path / "x.jsonl"
        for name in "ab":
            records.append(path, cells[name])
            with path.with_suffix(".jsonl.gz").open("ab") as published:
                published.write(gzip.compress(path.read_bytes()))
            path.unlink()
        records.append(path, cells["c"])
        assert records.read(tmp_path) == cells

    def test_a_second_runner_is_refused(self, tmp_path):
        with (
            records.locked(tmp_path),
            pytest.raises(SystemExit, match="another run"),
            records.locked(tmp_path),
        ):
            pass

    def test_no_line_has_a_value_that_json_lacks(self, tmp_path):
        with pytest.raises(ValueError, match="Out of range"):
            records.append(tmp_path / "x.jsonl", [self.line("a", "dev", loss=math.nan)])


def cut_theorem(folder: Path, steps: int) -> list[str]:
    """Write `theorem` cut to a few cells of that many steps; return the command that runs it."""
    source = (
        (plan.SPECS / "theorem.toml")
        .read_text()
        .replace("seeds = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]", "seeds = [0, 1]")
    )
    methods = source.split("[[method]]")
    figures = methods[-1].split("[[figure]]")[1]
    source = "[[method]]".join(methods[:3]) + "[[figure]]" + figures
    source = source.replace("ranks = [1, 8, 16, 24]", "ranks = [8]").replace(
        "steps = 30", f"steps = {steps}"
    )
    source = source.replace("train = 5000", "train = 600")
    (folder / "theorem.toml").write_text(source)
    command = [sys.executable, "-m", "examples.experiments", "run", "theorem", "--jobs", "1"]
    return [*command, "--experiments", str(folder), "--results", str(folder)]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run `theorem` cut to a few cells; kill it on the way."""
    folder = tmp_path_factory.mktemp("experiments")
    command = cut_theorem(folder, steps=3)
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as run:
        while len(records.read(folder)) < 2:
            assert run.poll() is None, run.stderr and run.stderr.read()
            time.sleep(0.01)
        os.kill(run.pid, signal.SIGKILL)
    before = (folder / "theorem.jsonl").read_text()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / "theorem.jsonl").read_text().startswith(before)
    return folder


class TestRunner:
    def test_a_killed_run_goes_on_and_runs_nothing_twice(self, ran):
        lines = [json.loads(line) for line in (ran / "theorem.jsonl").read_text().splitlines()]
        starts = Counter(line["cell"] for line in lines if line["event"] == "start")
        e = plan.load("theorem", ran)
        assert starts == {cell.key: 1 for cell in plan.finals(e, {})}
        assert len(starts) == 4

    def test_the_worker_of_a_killed_run_ends_too(self, tmp_path):
        command = cut_theorem(tmp_path, steps=1_000_000)
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as run:
            while not any(path.stat().st_size for path in tmp_path.glob("under-way/*")):
                assert run.poll() is None, run.stderr and run.stderr.read()
                time.sleep(0.01)
            os.kill(run.pid, signal.SIGKILL)
            run.communicate(timeout=60)  # to the end of the stream that the worker writes to, too

    def test_the_report_is_made_of_the_lines_alone(self, ran, tmp_path):
        e = plan.load("theorem", ran)
        page = tmp_path / "page.md"
        page.write_text("before\n<!-- theorem -->\nold\n<!-- end of theorem -->\nafter\n")
        said = report.write(e, ran, tmp_path, page)
        assert (tmp_path / "theorem-curves-r8.png").stat().st_size > 1000
        additive = next(line for line in said.splitlines() if line.startswith("| additive r=8"))
        assert additive in page.read_text()
        assert page.read_text().startswith("before\n") and page.read_text().endswith("after\n")
        assert "old" not in page.read_text()

    def test_the_theorem_holds_in_the_lines(self, ran):
        """Rank 24 at rank 8: three cycles of additive draws; one of LoRA does not get there."""
        found = {r.method.name: r for r in outcomes.gather(plan.load("theorem", ran), ran)}
        assert all(end["test"]["loss"] < 1e-20 for end in found["additive"].ends())
        assert all(end["test"]["loss"] > 1e-2 for end in found["LoRA"].ends())
