"""Tables and figures of lines written by hand, and of the published ones."""

import itertools
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.experiments import differences, figures, marking, outcomes, plan, records, report
from small_experiment import METHODS, RATES, SETTING, experiment


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
        cost = {"step_seconds": step, "draw_seconds": draw, "peak_mib": 7.0, "run": "today"}
        cost |= {"cpu": "a processor", "threads": 2}
        slow = {**cost, "step_seconds": 3 * step, "draw_seconds": 3 * draw}  # a busy round
        end = {"event": "end", "trainable": trainable, "steps": 100, "cycles": 4}
        runs = {
            seed: [
                {"event": "start", "data": ""},
                {**end, "best": 3 * loss, "test": {"loss": loss}},
            ]
            for seed, loss in enumerate(losses)
        }
        costs = {0: cost, 1: slow, 2: cost}
        of_full = {"step_seconds": 2.0, "run": "today"}
        full = {0: of_full, 1: {**of_full, "step_seconds": 6.0}, 2: of_full}
        return outcomes.Result(method, 1e-3, "", runs, costs, full)

    @given(st.lists(st.floats(-5, 5), min_size=2, max_size=8))
    def test_the_confidence_interval_is_students(self, values):
        from scipy import stats

        middle, half = outcomes.interval(values)
        assert middle == pytest.approx(sum(values) / len(values), abs=1e-9)
        if len(set(values)) > 1 and half > 1e-6:
            low, high = stats.t.interval(0.95, len(values) - 1, middle, stats.sem(values))
            assert (high - low) / 2 == pytest.approx(half, rel=1e-6)

    def test_differences_are_paired_by_seed(self):
        lora = self.result(METHODS[1], [1.0, 2.0, 3.0], 1.0, 0.0)
        rosa = self.result(METHODS[2], [0.9, 1.9, 2.9], 1.0, 0.0)
        middle, half = outcomes.interval([a - b for a, b in outcomes.pairs(rosa, lora)])
        assert middle == pytest.approx(-0.1)
        assert half == pytest.approx(0, abs=1e-9)  # though the seeds differ by 1

    def test_a_method_is_compared_with_one_of_as_many_values_and_the_same_length(self):
        lora = self.result(METHODS[1], [1.0], trainable=40_960)
        one_side = self.result(METHODS[2]._replace(rank=7, train="output"), [1.0], trainable=40_320)
        higher = self.result(METHODS[2]._replace(rank=5), [1.0], trainable=51_200)
        longer = self.result(METHODS[2]._replace(length=2.0), [1.0], trainable=40_960)
        results = [higher, longer, one_side, lora]
        assert outcomes.baseline_of(one_side, results, "LoRA") is lora
        none = [outcomes.baseline_of(r, results, "LoRA") for r in (higher, longer, lora)]
        assert none == [None] * 3
        assert outcomes.baseline_of(one_side, results, "full") is None

    @pytest.mark.parametrize("other", ["final", "tune"])
    def test_cells_of_other_data_or_another_base_are_not_compared(self, tmp_path, other):
        e = experiment(rates=RATES[:1], methods=METHODS[1:2])  # one rate: nothing to search
        cells = [*plan.due(e, {}), plan.tuning(e, METHODS[1])[0]]
        for data, path in (("same", tmp_path / "same"), ("other", tmp_path / "other")):
            path.mkdir()
            for cell in cells:
                of = data if cell.phase == other and cell.seed != 0 else "same"
                start = {"cell": cell.key, "event": "start", "data": of}
                end = {"cell": cell.key, "event": "end", "best": 1.0}
                records.append(path / "x.jsonl", [start, end])
        (result,) = outcomes.gather(e, tmp_path / "same")
        assert len(result.runs) == 2
        with pytest.raises(SystemExit, match="different data or base models"):
            outcomes.gather(e, tmp_path / "other")

    def test_the_time_spent_is_that_of_the_runs_alone(self, tmp_path):
        for name, end in (("a", {"seconds": 1800.0}), ("b", {"seconds": 5400.0}), ("cost", {})):
            start = {"cell": name, "event": "start"}
            records.append(tmp_path / "x.jsonl", [start, {"cell": name, "event": "end", **end}])
        assert report.spent(tmp_path).startswith("2 runs,")
        assert ": 2.0 hours of training on one core each" in report.spent(tmp_path)

    def test_a_logarithmic_figure_shows_the_geometric_mean_and_the_range_of_the_seeds(
        self, tmp_path, monkeypatch
    ):
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
            assert axes.lines[0].get_ydata()[-1] == pytest.approx(1e-6)  # the geometric mean
            assert (low, high) == pytest.approx((1e-9, 1.0 if kind == "curves" else 1e-3))
            assert 1e-11 < axes.get_ylim()[0] < 1e-9

    def test_a_line_over_ranks_breaks_where_the_method_alone_was_not_run(
        self, tmp_path, monkeypatch
    ):
        shown = []
        monkeypatch.setattr(figures.plt, "close", lambda d: shown.append(d.axes[0]))
        at = {METHODS[1]: [2, 4, 8], METHODS[2]: [2, 8, 16]}
        results = [
            self.result(method._replace(rank=rank), [1.0 + rank, 1.2 + rank], trainable=10 + rank)
            for method, ranks in at.items()
            for rank in ranks
        ]
        figures.draw({"kind": "ranks", "y": "loss"}, experiment(), results, tmp_path)
        lines = [bar.lines[0] for bar in shown[0].containers]
        assert [line.get_xdata().tolist() for line in lines] == [[2, 4, 8], [2, 4, 8, 16]]
        assert [math.isnan(y) for y in lines[1].get_ydata()] == [False, True, False, False]
        assert shown[0].get_xticks().tolist() == [2, 4, 8, 16]  # none of them is run at rank 3

    @pytest.mark.parametrize(
        ("loss", "note"),
        [(0.01, ", below the axis ↓"), (2.5, ""), (90.0, ", above the axis ↑")],
    )
    def test_full_fine_tuning_does_not_stretch_the_axis(self, tmp_path, monkeypatch, loss, note):
        """It left two thirds of some figures empty: it is a line, or a note of its value."""
        shown = []
        monkeypatch.setattr(figures.plt, "close", lambda d: shown.append(d.axes[0]))
        runs = {METHODS[0]: loss, METHODS[1]: 2.0, METHODS[2]: 3.0}
        results = [self.result(method, [value, value]) for method, value in runs.items()]
        figures.draw({"kind": "ranks", "y": "loss"}, experiment(), results, tmp_path)
        assert f"full fine-tuning: {loss:g}{note}" in [text.get_text() for text in shown[0].texts]
        low, high = shown[0].get_ylim()
        assert 1.9 < low < 2.0 and 3.0 < high < 3.1

    def test_names_at_the_ends_of_lines_stand_apart_and_say_what_is_beyond_the_axis(self):
        axes = figures.plt.figure().subplots()
        axes.set_ylim(0, 1)
        ends = [0.5, 0.5, 0.501, 0.9, -2.0]
        marking.label(axes, [marking.End(1, y, str(i), "black") for i, y in enumerate(ends)])
        heights = [text.xyann[1] for text in axes.texts]
        texts = [text.get_text() for text in axes.texts]
        figures.plt.close("all")
        apart = min(b - a for a, b in itertools.pairwise(sorted(heights)))
        assert apart == pytest.approx(marking.APART, rel=0.01)
        assert heights[3:] == pytest.approx([0.9, 0.0])
        assert texts == ["0", "1", "2", "3", "4: -2 ↓"]

    @pytest.mark.parametrize("losses", [[1.5, 2.6, 3.4], [1.5, 2.6]])
    def test_differences_are_shown_paired_to_each_that_is_asked_for(
        self, tmp_path, monkeypatch, losses
    ):
        """Intervals of the methods overlapped where that of the difference had no zero in it."""
        shown = []
        monkeypatch.setattr(figures.plt, "close", lambda d: shown.append(d.axes))
        of_lora = [2.0, 3.0, 4.0][: len(losses)]
        results = [self.result(METHODS[1], of_lora), self.result(METHODS[2], losses)]
        e = experiment(compare=("LoRA", "ROSA"))
        figures.draw({"kind": "differences", "y": "loss"}, e, results, tmp_path)
        apart = [a - b for a, b in zip(losses, of_lora, strict=True)]
        middle, half = outcomes.interval(apart)
        low, high = (middle - half, middle + half) if len(apart) > 2 else (min(apart), max(apart))
        for axes, sign in zip(shown[0], (1, -1), strict=True):
            (bar,) = axes.containers
            assert bar.lines[0].get_xdata()[0] == pytest.approx(sign * middle)
            caps = sorted(sign * cap.get_xdata()[0] for cap in bar.lines[1])
            assert caps == pytest.approx([low, high])
        assert [tick.get_text() for tick in shown[0][0].get_yticklabels()] == ["LoRA", "ROSA"]

    def test_differences_over_steps_are_paired_by_seed(self, tmp_path, monkeypatch):
        shown = []
        monkeypatch.setattr(figures.plt, "close", lambda d: shown.append(d.axes))
        results = [self.result(method, [1.0, 5.0]) for method in METHODS[1:3]]
        for result, shift in zip(results, (0.0, 0.25), strict=True):
            for seed, lines in result.runs.items():
                dev = [(0, 9.0), (5, 4 * seed + 1 + shift)]
                lines[1:1] = [{"event": "dev", "step": s, "loss": v} for s, v in dev]
        figures.draw({"kind": "gaps", "y": "loss"}, experiment(), results, tmp_path)
        (axes,) = shown[0]
        assert axes.lines[0].get_xydata().tolist() == [[0, 0], [5, 0.25]]

    @pytest.mark.parametrize("kind", figures.KINDS)
    def test_a_figure_of_one_unfinished_run_is_drawn(self, tmp_path, kind):
        """What there is to show at first: one seed, no other method, no costs."""
        result = self.result(METHODS[2], [1.0])._replace(costs={})
        result.runs[0].insert(1, {"event": "dev", "step": 0, "loss": 1.0})
        path = figures.draw({"kind": kind, "y": "loss"}, experiment(), [result], tmp_path)
        assert path.stat().st_size > 1000

    def test_the_finding_of_a_file_is_not_the_title_of_other_lines(self, tmp_path, monkeypatch):
        shown = []
        monkeypatch.setattr(figures.plt, "close", shown.append)
        figure = {"kind": "bars", "finding": "ROSA wins", "y": "loss"}
        results = [self.result(METHODS[2], [1.0, 3.0])]
        for published in (True, False):
            figures.draw(figure, experiment(title="Toy"), results, tmp_path, published)
        assert [drawing.get_suptitle() for drawing in shown] == ["ROSA wins", "Toy"]

    @given(st.lists(st.floats(0, 1e6), min_size=1, max_size=3))
    def test_the_middle_lies_in_its_band(self, values):
        for axis in ({"log": True}, {}):
            middle, low, high = figures.spread(values, axis)
            assert low <= middle <= high or (len(values) == 1 and not axis)  # one has no interval

    @pytest.mark.parametrize("name", [n for n in plan.names() if n.startswith("glue")])
    def test_the_axis_of_bars_holds_every_interval(self, tmp_path, monkeypatch, name):
        shown = []
        monkeypatch.setattr(figures.plt, "close", lambda d: shown.append(d.axes[0]))
        e = plan.load(name)
        figures.draw(e.figures[0], e, outcomes.gather(e, plan.RESULTS), tmp_path)
        low, high = shown[0].get_xlim()
        ends = [x for bar in shown[0].containers for x in bar.lines[1]]
        assert ends and all(low < cap.get_xdata()[0] < high for cap in ends)

    def test_time_is_of_whole_runs_with_their_draws(self):
        rosa = self.result(METHODS[2], [1.0], 1.0, 5.0)
        assert outcomes.time_ratio(rosa) == pytest.approx((100 * 1 + 4 * 5) / (100 * 2))

    def test_times_of_other_runs_are_not_compared(self):
        rosa = self.result(METHODS[2], [1.0], 1.0, 5.0)
        rosa.full[1]["run"] = "yesterday"
        rosa.full[1]["step_seconds"] = 1e-6
        assert outcomes.time_ratio(rosa) == pytest.approx((100 * 1 + 4 * 5) / (100 * 2))
        for line in rosa.full.values():
            line["run"] = "yesterday"
        assert outcomes.time_ratio(rosa) is None

    def test_times_are_relative_to_full_fine_tuning_even_where_no_table_has_it(self, tmp_path):
        e = experiment(rates=[1e-3], seeds=[0], methods=METHODS[1:3], rounds=1)
        e = e._replace(setting={**SETTING, "task": "code"})
        end = {"event": "end", "trainable": 10, "steps": 100, "cycles": 4, "best": 1.0}
        for cell in plan.finals(e, {}):
            own = {**end, "cell": cell.key, "test": {"loss": 1.0}, "run": "before"}
            records.append(tmp_path / "x.jsonl", [{"event": "start", "data": ""}, own])
        steps = {"full": 2.0, "LoRA": 1.0, "ROSA": 1.0}
        for cell in plan.costs(e):
            start = {"event": "start", "data": "of another base", "cpu": "a processor"}
            step = {"step_seconds": steps[cell.method.name], "draw_seconds": 5.0, "peak_mib": 7.0}
            own = {"event": "end", "cell": cell.key, "best": None, "run": "today", **step}
            records.append(tmp_path / "x.jsonl", [{**start, "threads": 2}, own])
        found = outcomes.gather(e, tmp_path)
        assert [outcomes.time_ratio(result) for result in found] == [0.6, 0.6]
        assert "MiB and time: a processor, 2 threads." in report.table(e, found)

    def test_a_table_has_mean_interval_difference_time_and_diverged_runs(self):
        full = self.result(METHODS[0], [1.0, 1.0], 2.0, 0.0, trainable=100)
        lora = self.result(METHODS[1], [2.0, 2.2], 1.0, 0.0)
        rosa = self.result(METHODS[2], [1.5, 1.9], 1.0, 5.0)
        rosa.runs[2] = [{"data": ""}, {"event": "end", "trainable": 10, "best": None}]
        compared = experiment(setting={"task": "code"}, compare=("LoRA", "ROSA"))
        lines = report.table(compared, [full, lora, rosa]).splitlines()
        assert lines[0] == (
            "| method | NLL | to LoRA (NLL) | on dev | to ROSA (NLL) | on dev "
            "| values | rate | n | MiB | time |"
        )
        half, apart = 12.706 * 0.4 / 2, 12.706 * 0.2 / 2  # t(0.975, 1) times half of the range
        assert lines[4] == (
            f"| ROSA r=2 | 1.7 ± {half:.1f} | -0.4 ± {apart:.1f} | -1.2 ± {3 * apart:.1f} |  |  "
            "| 10 | 0.001 | 2 (1 diverged) | 7 | 0.6 |"
        )
        assert "embeddings, biases and norms frozen" in lines[-1]
        assert lines[-1].endswith("MiB and time: a processor, 2 threads.")

    def test_errors_that_span_decades_are_reported_by_geometric_means(self):
        lora = self.result(METHODS[1], [0.5, 0.5])
        rosa = self.result(METHODS[2], [1e-6, 1e-4])
        lines = report.table(experiment(setting={"task": "regression/linear"}), [lora, rosa])
        assert "| over LoRA's |" in lines
        apart = 10**12.706  # t(0.975, 1) times half of the range, which is two decades
        low, high, shown = 1e-5 / apart, 1e-5 * apart, "{:.2g} [{:.2g}, {:.2g}]".format
        assert f"| {shown(1e-5, low, high)} | {shown(2e-5, 2 * low, 2 * high)} |" in lines


def test_results_in_another_folder_do_not_go_into_the_published_page(tmp_path):
    published = plan.RESULTS
    own_page = tmp_path / "p.md"
    assert report.places(published, None, None, True) == (PAGE, PAGE.parent / "figures")
    for results, own_files in ((tmp_path, True), (published, False)):
        assert report.places(results, None, None, own_files) == (None, results / "figures")
        assert report.places(results, own_page, None, own_files) == (own_page, tmp_path / "figures")


PAGE = plan.FOLDER / "RESULTS.md"


@pytest.mark.parametrize("name", report.placed(PAGE, plan.names()))
def test_the_page_has_the_table_of_the_published_lines(name):
    experiment = plan.load(name)
    text = report.table(experiment, outcomes.gather(experiment, plan.RESULTS))
    assert f"<!-- {name} -->\n{text}\n<!-- end of {name} -->" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", plan.names())
def test_a_figure_of_nll_names_the_unit(name):
    for figure in plan.load(name).figures:
        assert "NLL" not in figure["y"] or figure["y"].endswith("(nats a token)")


@pytest.mark.parametrize("name", plan.names())
def test_a_figure_has_a_finding_of_its_own_as_title(name):
    for figure in plan.load(name).figures:
        assert figure["finding"] not in (figure["y"], "")


def test_each_method_has_one_colour_in_all_figures():
    methods = [method for name in plan.names() for method in plan.load(name).methods]
    colours = {marking.colour(m): marking.kind(m) for m in methods}
    assert len(set(marking.COLOURS.values())) == len(marking.COLOURS)
    assert set(colours.values()) == set(marking.COLOURS)
    assert "black" not in colours


def test_the_summary_has_methods_of_the_files():
    for _, name, resampled, once in differences.SUMMARY:
        of = {m.name: m for m in plan.load(name).methods} | {"": None}
        assert (of[resampled].sampler, bool(of[resampled].every)) == ("random", True)
        assert of[once] is None or (of[once].sampler, of[once].every) == ("random", 0)


def test_the_page_begins_with_a_summary_of_one_screen():
    """Some 90 lines stood before the first result."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    shown = [i for i, line in enumerate(lines) if line.startswith("![")]
    assert shown[1] < 45 and "crossing-e2e" in lines[shown[1]]


def test_each_figure_of_the_page_is_one_of_a_file_and_the_other_way_round():
    linked = set(re.findall(r"\(figures/(.+?)\.png\)", PAGE.read_text(encoding="utf-8")))
    drawn = {
        figures.stem(figure, plan.load(name))
        for name in report.placed(PAGE, plan.names())
        for figure in plan.load(name).figures
    }
    drawn.add("summary")
    assert linked == drawn == {path.stem for path in (plan.FOLDER / "figures").glob("*.png")}
