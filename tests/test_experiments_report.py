"""Tables and figures of lines written by hand, and of the published ones."""

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.experiments import figures, outcomes, plan, records, report
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
        at = {METHODS[0]: [0], METHODS[1]: [2, 4, 8], METHODS[2]: [2, 8, 16]}
        results = [
            self.result(method._replace(rank=rank), [1.0 + rank, 1.2 + rank], trainable=10 + rank)
            for method, ranks in at.items()
            for rank in ranks
        ]
        figures.draw({"kind": "ranks", "y": "loss"}, experiment(), results, tmp_path)
        found = [bar.lines[0].get_xdata().tolist() for bar in shown[0].containers]
        nan = pytest.approx(math.nan, nan_ok=True)
        assert found == [[10], [12, 14, 18], [12, nan, 18, 26]]  # none of them is run at rank 3
        assert shown[0].get_xticks().tolist() == [10, 12, 14, 18, 26]

    @given(st.lists(st.floats(0, 1e6), min_size=1, max_size=3))
    def test_the_middle_lies_in_its_band(self, values):
        for axis in ({"log": True}, {}):
            middle, low, high = figures.spread(values, axis)
            assert low <= middle <= high or (len(values) == 1 and not axis)  # one has no interval

    @pytest.mark.parametrize("asked", [False, True])
    def test_bars_show_full_fine_tuning_only_where_the_figure_asks(
        self, tmp_path, monkeypatch, asked
    ):
        shown = []
        monkeypatch.setattr(figures.plt, "close", lambda d: shown.append(d.axes[0]))
        results = [self.result(method, [1.0, 3.0]) for method in METHODS[:3]]
        figure = {"kind": "bars", "y": "loss"} | ({"full": True} if asked else {})
        figures.draw(figure, experiment(), results, tmp_path)
        names = [label.get_text() for label in shown[0].get_yticklabels()]
        assert names == ["ROSA r=2", "LoRA r=2"] + ["full"] * asked
        means = [bar.lines[0].get_xdata()[0] for bar in shown[0].containers]
        assert means == [2.0] * len(names)

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
            "| method | values | rate | n | NLL | to LoRA (NLL) | on dev "
            "| to ROSA (NLL) | on dev | MiB | time |"
        )
        half, apart = 12.706 * 0.4 / 2, 12.706 * 0.2 / 2  # t(0.975, 1) times half of the range
        assert lines[4] == (
            f"| ROSA r=2 | 10 | 0.001 | 2 (1 diverged) | 1.7 ± {half:.1f} | -0.4 ± {apart:.1f} "
            f"| -1.2 ± {3 * apart:.1f} |  |  | 7 | 0.6 |"
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


def test_each_figure_of_the_page_is_one_of_a_file_and_the_other_way_round():
    linked = set(re.findall(r"\(figures/(.+?)\.png\)", PAGE.read_text(encoding="utf-8")))
    drawn = {
        figures.stem(figure, plan.load(name))
        for name in report.placed(PAGE, plan.names())
        for figure in plan.load(name).figures
    }
    assert linked == drawn == {path.stem for path in (plan.FOLDER / "figures").glob("*.png")}
