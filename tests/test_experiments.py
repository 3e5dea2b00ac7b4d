"""The experiments' harness: what makes its comparisons fair, and its lines whole."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import randn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rosa_func
from examples.experiments import (
    adapting,
    draws,
    figures,
    generation,
    glue,
    plan,
    records,
    report,
    task,
    text,
    training,
)
from examples.experiments import tiny as small
from rosa_func import samplers

ROOT = Path(__file__).parents[1]
RATES = [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]
METHODS = [
    plan.Method("full", "full"),
    plan.Method("LoRA", "lora", rank=2),
    plan.Method("ROSA", "random", rank=2, every=3),
    plan.Method("aligned", "aligned", rank=2, every=3, moments="keep", train="output"),
    plan.Method("importance", "importance", rank=2, every=2, growth=2.0, moments="project"),
    plan.Method("all to the input", "random", rank=2, every=3, share=1.0, rewarm=2),
]
SETTING = {"steps": 7, "tune_steps": 3, "warmup": 2, "eval_every": 3}


def experiment(**changes: Any) -> plan.Experiment:
    start = dict.fromkeys(METHODS, RATES[2])
    parts = {"name": "x", "title": "", "setting": SETTING, "rates": RATES, "seeds": [0, 1]}
    parts |= {
        "tune_seed": 9,
        "methods": METHODS,
        "start": start,
        "like": {},
        "times": {},
        "figures": [],
    }
    return plan.Experiment(**(parts | changes))


class Seen:
    """A small regression that notes what the training loop asks of it."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []
        self.splits: Counter[str] = Counter()

    def load(self) -> task.Task:
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        model.load_state_dict({k: randn(*v.shape) for k, v in model.state_dict().items()})

        def batches(seed: int) -> Iterator[Tensor]:
            generator = torch.Generator().manual_seed(seed)
            while True:
                yield torch.randn(8, 6, generator=generator)

        def loss(forward: task.Forward, batch: Tensor) -> Tensor:
            self.batches.append(batch)
            return F.mse_loss(forward(batch), batch[:, :4])

        def evaluate(forward: task.Forward, split: str) -> task.Metrics:
            self.splits[split] += 1
            with torch.no_grad():
                return {"loss": F.mse_loss(forward(torch.ones(1, 6)), torch.zeros(1, 4)).item()}

        return task.Task(model, [], batches, loss, evaluate)


def lines_of(method: plan.Method, phase: str = "final") -> tuple[Seen, list[records.Line]]:
    seen = Seen()
    cell = plan.Cell(SETTING, method, 1e-2, 3, phase)
    return seen, list(training.run(cell, seen.load))


class TestFairness:
    @pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
    def test_every_method_trains_on_the_same_batches_in_the_same_order(self, method):
        seen, lines = lines_of(method)
        expected = [batch for batch, _ in zip(Seen().load().batches(3), range(7), strict=False)]
        own = [b for b in seen.batches if any(torch.equal(b, e) for e in expected)]
        assert len(own) == 7
        assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))
        if method.sampler not in ("aligned", "importance"):
            assert len(seen.batches) == 7  # the other two also look at a gradient when they draw
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

    def test_one_schedule_for_all_but_where_rewarming_is_what_is_compared(self):
        def rates(method: plan.Method) -> list[float]:
            cell = plan.Cell(SETTING, method, 0.5, 0, "final")
            resamples = set(adapting.cycle_starts(method, 7))
            return [training.rate(cell, step, resamples) for step in range(7)]

        usual = rates(METHODS[0])
        assert usual == pytest.approx([0.25, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1])
        assert all(rates(method) == usual for method in METHODS[:5])
        assert rates(METHODS[5]) == pytest.approx(
            [0.25, 0.5, 0.5, 0.4 / 3, 0.3 * 2 / 3, 0.2, 0.1 / 3]
        )

    def test_test_is_scored_with_the_weights_that_were_best_on_dev(self):
        seen = Seen()
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
        made = Seen().load()

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
        made = Seen().load()
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
            seen = Seen()
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


class TestSearch:
    @given(
        st.integers(0, 5), st.integers(0, 5), st.lists(st.floats(0.01, 1), min_size=6, max_size=6)
    )
    def test_the_search_ends_at_the_best_rate_of_a_loss_with_one_minimum(self, best, start, gaps):
        method = METHODS[1]
        e = experiment(start={method: RATES[start]})
        cells = plan.tuning(e, method)
        losses = {c.key: sum(gaps[min(i, best) : max(i, best)], 0.0) for i, c in enumerate(cells)}
        scores: dict[str, float] = {}
        for _ in range(6):
            _, missing = plan.walk(e, method, scores)
            assert not {cell.key for cell in missing} & scores.keys()
            scores |= {cell.key: losses[cell.key] for cell in missing}
        assert not plan.walk(e, method, scores)[1]
        assert plan.best_rate(e, method, scores) == RATES[best]

    def test_a_diverged_run_is_never_the_best(self):
        method = METHODS[1]
        losses = [1.0, 0.5, math.inf, math.inf, math.inf, math.inf]
        keys = [cell.key for cell in plan.tuning(experiment(), method)]
        assert (
            plan.best_rate(experiment(), method, dict(zip(keys, losses, strict=True))) == RATES[1]
        )

    def test_published_seeds_wait_for_the_rate(self):
        e = experiment(methods=METHODS[1:3], like={METHODS[2]: METHODS[1]})
        assert {cell.phase for cell in plan.due(e, {})} == {"tune"}
        keys = [cell.key for cell in plan.tuning(e, METHODS[1])]
        scores = dict(zip(keys, [3.0, 2.0, 1.0, 2.0, 3.0, 4.0], strict=True))
        due = plan.due(e, scores)
        assert [(c.method.name, c.seed, c.rate) for c in due] == [
            ("LoRA", 0, RATES[2]),
            ("ROSA", 0, RATES[2]),  # that of LoRA, by `like`
            ("LoRA", 1, RATES[2]),
            ("ROSA", 1, RATES[2]),
        ]

    def test_a_rate_can_be_that_of_another_method_times_a_factor(self):
        like, times = {METHODS[2]: METHODS[1]}, {METHODS[2]: 0.5}
        e = experiment(methods=METHODS[1:3], like=like, times=times)
        keys = [cell.key for cell in plan.tuning(e, METHODS[1])]
        scores = dict(zip(keys, [3.0, 2.0, 1.0, 2.0, 3.0, 4.0], strict=True))
        assert plan.best_rate(e, METHODS[1], scores) == RATES[2]
        assert plan.best_rate(e, METHODS[2], scores) == RATES[1]  # the one below it in the grid

    def test_the_costs_come_when_nothing_else_is_due(self):
        e = experiment(rates=[1e-3], seeds=[0], methods=METHODS[1:3])
        scores = {cell.key: 1.0 for cell in plan.due(e, {})}
        due = [(c.method.name, c.phase, c.seed) for c in plan.due(e, scores)]
        turns = range(e.rounds)
        assert due == [(name, "cost", turn) for turn in turns for name in ("LoRA", "ROSA")]

    def test_lengths_of_one_method_share_one_search_whose_cells_are_due_once(self):
        methods = [METHODS[1], METHODS[1]._replace(length=2.0)]
        due = plan.due(experiment(methods=methods, start=dict.fromkeys(methods, RATES[2])), {})
        assert [(c.rate, c.steps) for c in due] == [(rate, 3) for rate in RATES[1:4]]

    def test_the_key_is_of_all_that_decides_the_result_and_of_nothing_else(self):
        cell = plan.Cell(SETTING, METHODS[2], 1e-3, 0, "final")
        assert cell._replace(method=METHODS[2]._replace(name="other")).key == cell.key
        others = [
            cell._replace(setting={**SETTING, "steps": 8}),
            cell._replace(method=METHODS[2]._replace(every=4)),
            cell._replace(rate=2e-3),
            cell._replace(seed=1),
            cell._replace(phase="tune"),
        ]
        assert len({c.key for c in [cell, *others]}) == 6

    @pytest.mark.parametrize("name", plan.names())
    def test_every_file_is_an_experiment(self, name):
        e = plan.load(name)
        assert len(e.methods) == len({method.label for method in e.methods})
        assert {"task", "rows", "batch", "warmup", "eval_every"} <= e.setting.keys()


class TestLines:
    def line(self, cell: str, event: str, **fields: Any) -> records.Line:
        return {"cell": cell, "event": event, **fields}

    def of_file(self, lines: list[records.Line], name: str) -> list[records.Line]:
        return [*lines[:-1], {**lines[-1], "file": name}]

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
        assert records.read(tmp_path) == {"a": self.of_file(whole, "x.jsonl")}
        assert records.scores(records.read(tmp_path)) == {"a": 2.0}

    def test_a_torn_line_is_cut_off_and_the_cell_runs_again(self, tmp_path):
        path = tmp_path / "x.jsonl"
        whole = [self.line("a", "start"), self.line("a", "end")]
        records.append(path, whole)
        before = path.read_bytes()
        for torn in (b'{"cell": "b", "ev', b'{"cell": "b", "event": "start"}\n{"cell"'):
            path.write_bytes(before + torn)
            with records.locked(tmp_path):
                assert records.read(tmp_path) == {"a": self.of_file(whole, "x.jsonl")}
            assert path.read_bytes().startswith(before)

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


class TestScores:
    def test_nll_weighs_tokens_alike(self):
        """Not the mean over batches: with 20 rows of growing length the two differ."""
        logits = randn(50, 7, seed=1)

        def forward(input_ids: Tensor, **_: Any) -> Any:
            return type(
                "Output",
                (),
                {"logits": logits[: input_ids.shape[1]].expand(len(input_ids), -1, -1)},
            )

        rows = [([1] * (1 + n % 3), [n % 7] * (1 + n)) for n in range(20)]
        found = text.evaluate(forward, rows)
        log_p = logits.log_softmax(1)
        terms = [
            -log_p[len(prompt) - 1 + i, token].item()
            for prompt, reference in rows
            for i, token in enumerate(reference)
        ]
        assert found["loss"] == pytest.approx(sum(terms) / len(terms), rel=1e-5)
        assert found["ppl"] == pytest.approx(math.exp(sum(terms) / len(terms)), rel=1e-5)
        assert found["bits"] == pytest.approx(found["loss"] / math.log(2))

    def test_a_text_that_equals_any_of_its_references_scores_in_full(self):
        references = [
            ["one two three four five six", "a b c d e f g"],
            ["what is that over there now"],
        ]
        best = generation.metrics(["a b c d e f g", "What is that over there now"], references)
        assert best["bleu"] == pytest.approx(100)
        assert best["rouge_l"] == pytest.approx(1)
        worse = generation.metrics(["a b c x e f g", "what is that over here now"], references)
        assert all(worse[name] < best[name] for name in best)

    def test_glue_chooses_on_a_tenth_of_train_and_reports_dev(self, tmp_path):
        small.make(tmp_path)
        setting = {"model": "tiny:bert", "length": 32, "rows": {"train": 60}, "batch": 4}
        made = glue.load("CoLA", setting, 0, tmp_path)
        sizes: dict[str, int] = {}
        for split in ("dev", "test"):
            rows: list[int] = []

            def forward(rows: list[int] = rows, **batch: Tensor) -> Any:
                rows.append(len(batch["input_ids"]))
                return type("Output", (), {"logits": torch.zeros(len(batch["input_ids"]), 2)})

            made.evaluate(forward, split)
            sizes[split] = sum(rows)
        assert sizes == {"dev": 6, "test": 70}
        trained: set[tuple[int, ...]] = set()
        chosen: set[tuple[int, ...]] = set()

        def note(into: set[tuple[int, ...]], **batch: Tensor) -> Any:
            into.update(tuple(row) for row in batch["input_ids"].tolist())
            return type("Output", (), {"logits": torch.zeros(len(batch["input_ids"]), 2)})

        stream = made.batches(0)
        for _ in range(3 * 54 // 4):
            made.loss(lambda **batch: note(trained, **batch), next(stream))
        made.evaluate(lambda **batch: note(chosen, **batch), "dev")
        assert len(trained) == 54 and len(chosen) == 6
        assert not trained & chosen
        head = [n for n, p in made.model.named_parameters() if n.startswith("classifier")]
        state = rosa_func.init(made.model, 2, train=made.train)
        assert set(head) <= set(rosa_func.named_parameters(state))

    @given(st.lists(st.floats(-5, 5), min_size=2, max_size=8))
    def test_the_interval_is_students(self, values):
        from scipy import stats

        middle, half = report.interval(values)
        assert middle == pytest.approx(sum(values) / len(values), abs=1e-9)
        if len(set(values)) > 1 and half > 1e-6:
            low, high = stats.t.interval(0.95, len(values) - 1, middle, stats.sem(values))
            assert (high - low) / 2 == pytest.approx(half, rel=1e-6)


class TestDraws:
    def site(self, name: str = "w", dim: int = 0) -> samplers.Site:
        return samplers.Site(name, dim, torch.Generator().manual_seed(0))

    @pytest.mark.parametrize("dim", [0, 1])
    def test_aligned_takes_the_side_of_the_most_gradient(self, dim):
        W, G = randn(8, 6), randn(8, 6, seed=1)
        A, B = draws.aligned({"w": G})(W, 3, self.site(dim=dim))
        assert not (A @ B).any()
        kept = A.T @ G if dim == 0 else G @ B.T
        best = torch.linalg.svdvals(G)[:3].square().sum()
        assert kept.square().sum().item() == pytest.approx(best.item(), rel=1e-5)

    def test_importance_draws_singular_terms_where_the_gradient_is(self):
        W = randn(8, 6, dtype=torch.float64)
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        G = U[:, [1, 4]] @ randn(2, 6, seed=1, dtype=torch.float64)
        G = G @ Vh[[1, 4]].T @ Vh[[1, 4]]
        A, B = draws.importance({"w": G})(W, 2, self.site())
        expected = U[:, [1, 4]] * S[[1, 4]] @ Vh[[1, 4]]
        assert torch.allclose(A @ B, expected, atol=1e-12)

    def test_importance_draws_by_both_sides_of_the_gradient(self):
        """One direction drawn: in proportion to |u^T G|^2 + |G v|^2, within 4 sigma."""
        W = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
        G = randn(4, 4, seed=3)
        energy = G.square().sum(1) + G.square().sum(0)
        sampler, generator = draws.importance({"w": G}), torch.Generator().manual_seed(0)
        site, n = self.site()._replace(generator=generator), 2000
        drawn = torch.stack([sampler(W, 1, site)[0][:, 0].abs() > 0 for _ in range(n)]).sum(0)
        p = energy / energy.sum()
        assert ((drawn - n * p).abs() < 4 * (n * p * (1 - p)).sqrt()).all()

    @given(st.floats(0, 1), st.integers(0, 1))
    def test_a_share_moves_norm_between_the_sides_and_keeps_the_product(self, share, dim):
        W = randn(8, 6, dtype=torch.float64)
        A, B = samplers.top(W, 3, self.site())
        A2, B2 = draws.shared(samplers.top, share)(W, 3, self.site(dim=dim))
        assert torch.allclose(A2 @ B2, A @ B)
        S = torch.linalg.svdvals(W)[:3].flip(0)
        side = A2.norm(dim=0) if dim == 0 else B2.norm(dim=1)
        assert torch.allclose(side, S**share)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run `theorem` cut to a few cells; kill it twice on the way."""
    folder = tmp_path_factory.mktemp("experiments")
    source = (
        (plan.FOLDER / "theorem.toml")
        .read_text()
        .replace("seeds = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]", "seeds = [0, 1]")
    )
    methods = source.split("[[method]]")
    figures = methods[-1].split("[[figure]]")[1]
    source = "[[method]]".join(methods[:3]) + "[[figure]]" + figures
    source = source.replace("ranks = [1, 8, 16, 24]", "ranks = [8]").replace(
        "steps = 30", "steps = 3"
    )
    source = source.replace("train = 5000", "train = 600")
    (folder / "theorem.toml").write_text(source)
    command = [sys.executable, "-m", "examples.experiments", "run", "theorem", "--jobs", "1"]
    command += ["--experiments", str(folder), "--results", str(folder)]
    for finished in (1, 2):
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as run:
            while len(records.read(folder)) < finished:
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
        found = {r.method.name: r for r in report.gather(plan.load("theorem", ran), ran)}
        assert all(end["test"]["loss"] < 1e-20 for end in found["additive"].ends())
        assert all(end["test"]["loss"] > 1e-2 for end in found["LoRA"].ends())


class TestReport:
    """Tables of lines written by hand, with the figures computed here once more."""

    def result(
        self,
        method: plan.Method,
        losses: list[float],
        step: float = 1.0,
        draw: float = 0.0,
        trainable: int = 10,
    ) -> Any:
        cost = {"step_seconds": step, "draw_seconds": draw, "peak_mib": 7.0, "file": "x.jsonl"}
        slow = {**cost, "step_seconds": 3 * step, "draw_seconds": 3 * draw}  # a busy round
        end = {"event": "end", "trainable": trainable, "steps": 100, "cycles": 4}
        runs = {
            seed: [
                {"event": "start", "data": ""},
                {**end, "best": 3 * loss, "test": {"loss": loss}},
            ]
            for seed, loss in enumerate(losses)
        }
        return report.Result(method, 1e-3, "", runs, {0: cost, 1: slow, 2: cost})

    def test_differences_are_paired_by_seed(self):
        lora = self.result(METHODS[1], [1.0, 2.0, 3.0], 1.0, 0.0)
        rosa = self.result(METHODS[2], [0.9, 1.9, 2.9], 1.0, 0.0)
        middle, half = report.interval([a - b for a, b in report.pairs(rosa, lora)])
        assert middle == pytest.approx(-0.1)
        assert half == pytest.approx(0, abs=1e-9)  # though the seeds differ by 1

    def test_a_method_of_as_many_values_and_the_same_length_is_compared_with(self):
        lora = self.result(METHODS[1], [1.0], trainable=40_960)
        one_side = self.result(METHODS[2]._replace(rank=7, train="output"), [1.0], trainable=40_320)
        higher = self.result(METHODS[2]._replace(rank=5), [1.0], trainable=51_200)
        longer = self.result(METHODS[2]._replace(length=2.0), [1.0], trainable=40_960)
        results = [higher, longer, one_side, lora]
        assert report.baseline_of(one_side, results, "LoRA") is lora
        none = [report.baseline_of(r, results, "LoRA") for r in (higher, longer, lora)]
        assert none == [None] * 3
        assert report.baseline_of(one_side, results, "full") is None

    @pytest.mark.parametrize("other", ["final", "tune"])
    def test_cells_of_other_data_or_another_base_are_not_compared(self, tmp_path, other):
        e = experiment(rates=RATES[:1], methods=METHODS[1:2])  # one rate, which is searched no more
        cells = [*plan.due(e, {}), plan.tuning(e, METHODS[1])[0]]
        for data, path in (("same", tmp_path / "same"), ("other", tmp_path / "other")):
            path.mkdir()
            for cell in cells:
                of = data if cell.phase == other and cell.seed != 0 else "same"
                start = {"cell": cell.key, "event": "start", "data": of}
                end = {"cell": cell.key, "event": "end", "best": 1.0}
                records.append(path / "x.jsonl", [start, end])
        (result,) = report.gather(e, tmp_path / "same")
        assert len(result.runs) == 2
        with pytest.raises(SystemExit, match="different data or base models"):
            report.gather(e, tmp_path / "other")

    def test_a_method_to_compare_with_that_is_not_there_is_named(self, tmp_path):
        for name in ("e2e", "moments"):
            shutil.copy(plan.FOLDER / f"{name}.toml", tmp_path)
        assert plan.load("moments", tmp_path).compare == ("reset",)
        file = tmp_path / "moments.toml"
        file.write_text(file.read_text(encoding="utf-8").replace('["reset"]', '["rest"]'))
        with pytest.raises(SystemExit, match="'rest', to compare with"):
            plan.load("moments", tmp_path)

    def test_a_factor_of_a_rate_needs_a_method_to_take_the_rate_from(self, tmp_path):
        text = (plan.FOLDER / "theorem.toml").read_text(encoding="utf-8")
        (tmp_path / "x.toml").write_text(text.replace("ranks =", "times = 0.5\nranks =", 1))
        with pytest.raises(SystemExit, match="has `times`, but is `like` no method"):
            plan.load("x", tmp_path)

    def test_another_model_has_cells_and_a_name_of_its_own(self):
        usual = plan.load("glue-cola")
        other = plan.with_model(usual, "FacebookAI/roberta-base")
        assert other.name == "glue-cola-FacebookAI-roberta-base"
        assert other.setting == {**usual.setting, "model": "FacebookAI/roberta-base"}
        keys = [{cell.key for cell in plan.due(e, {})} for e in (usual, other)]
        assert not keys[0] & keys[1]
        with pytest.raises(SystemExit, match="theorem takes no model"):
            plan.with_model(plan.load("theorem"), "minilm")

    def test_the_time_spent_is_that_of_the_runs_alone(self, tmp_path):
        for name, end in (("a", {"seconds": 1800.0}), ("b", {"seconds": 5400.0}), ("cost", {})):
            start = {"cell": name, "event": "start"}
            records.append(tmp_path / "x.jsonl", [start, {"cell": name, "event": "end", **end}])
        assert report.spent(tmp_path).startswith("2 runs,")
        assert ": 2.0 hours of training on one core each" in report.spent(tmp_path)

    def test_a_logarithmic_figure_shows_the_range_of_the_seeds(self, tmp_path, monkeypatch):
        drawn = []
        close = figures.plt.close
        monkeypatch.setattr(figures.plt, "close", lambda d: drawn.append(d) or close(d))
        result = self.result(METHODS[2], [1e-9, 1e-3])  # their 95% interval goes below zero
        for seed, loss in enumerate([1e-9, 1e-3]):
            dev = [{"event": "dev", "step": s, "loss": v} for s, v in ((0, 1.0), (5, loss))]
            result.runs[seed][1:1] = dev
        for kind in ("curves", "ranks"):
            figure = {"kind": kind, "log": True, "y": "loss"}
            figures.draw(figure, experiment(), [result], tmp_path)
            (axes,) = drawn[-1].axes
            (band,) = axes.collections
            (path,) = band.get_paths()
            low, high = path.vertices[:, 1].min(), path.vertices[:, 1].max()
            assert (low, high) == pytest.approx((1e-9, 1.0 if kind == "curves" else 1e-3))
            assert 1e-11 < axes.get_ylim()[0] < 1e-9

    def test_time_is_of_whole_runs_with_their_draws(self):
        full = self.result(METHODS[0], [1.0], 2.0, 0.0)
        rosa = self.result(METHODS[2], [1.0], 1.0, 5.0)
        assert report.time_ratio(rosa, full) == pytest.approx((100 * 1 + 4 * 5) / (100 * 2))

    def test_times_of_other_runs_are_not_compared(self, tmp_path):
        for name in ("a", "b"):
            records.append(
                tmp_path / f"{name}.jsonl",
                [{"cell": name, "event": "start"}, {"cell": name, "event": "end", "best": None}],
            )
        cells = records.read(tmp_path)
        assert {key: lines[-1]["file"] for key, lines in cells.items()} == {
            "a": "a.jsonl",
            "b": "b.jsonl",
        }
        full, rosa = self.result(METHODS[0], [1.0]), self.result(METHODS[2], [1.0])
        rosa.costs[0]["file"] = rosa.costs[1]["file"] = "other.jsonl"
        assert report.time_ratio(rosa, full) is None

    def test_every_search_for_a_rate_sees_a_resample(self):
        """A third of the steps at least come after it, or a rate would suit one draw alone."""
        for name in plan.names():
            e = plan.load(name)
            steps = e.setting.get("tune_steps", 0)
            for method in e.methods if len(e.rates) > 1 else []:
                if method.every and method not in e.like:
                    assert next(adapting.cycle_starts(method, steps), steps) <= steps * 2 / 3, name

    def test_a_table_has_mean_interval_difference_time_and_diverged_runs(self):
        full = self.result(METHODS[0], [1.0, 1.0], 2.0, 0.0, trainable=100)
        lora = self.result(METHODS[1], [2.0, 2.2], 1.0, 0.0)
        rosa = self.result(METHODS[2], [1.5, 1.9], 1.0, 5.0)
        rosa.runs[2] = [{"data": ""}, {"event": "end", "trainable": 10, "best": None}]
        compared = experiment(setting={"task": "code"}, compare=("LoRA", "ROSA"))
        lines = report.table(compared, [full, lora, rosa]).splitlines()
        assert lines[0] == (
            "| method | values | rate | n | NLL | to LoRA (NLL) | on dev "
            "| to ROSA (NLL) | on dev | MiB | time |"
        )
        half, apart = 12.706 * 0.4 / 2, 12.706 * 0.2 / 2  # t(0.975, 1) times half of the range
        assert lines[4] == (
            f"| ROSA r=2 | 10 | 0.001 | 2 (1 diverged) | 1.7 ± {half:.1f} | -0.4 ± {apart:.1f} "
            f"| -1.2 ± {3 * apart:.1f} |  |  | 7 | 0.6 |"
        )
        assert "embeddings, biases and norms frozen" in lines[-1]

    def test_errors_that_span_decades_are_told_by_geometric_means(self):
        lora = self.result(METHODS[1], [0.5, 0.5])
        rosa = self.result(METHODS[2], [1e-6, 1e-4])
        lines = report.table(experiment(setting={"task": "regression/linear"}), [lora, rosa])
        assert "| over LoRA's |" in lines
        apart = 10**12.706  # t(0.975, 1) times half of the range, which is two decades
        low, high, shown = 1e-5 / apart, 1e-5 * apart, "{:.2g} [{:.2g}, {:.2g}]".format
        assert f"| {shown(1e-5, low, high)} | {shown(2e-5, 2 * low, 2 * high)} |" in lines
