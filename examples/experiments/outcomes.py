"""What came of an experiment: its methods with their runs and costs, and how these compare."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

from scipy.stats import t as student

from examples.experiments import plan, records

ROUNDING = 2.0**-104  # of float64, squared


class Result(NamedTuple):
    """What was published of one method: its rate, its runs by seed, and its costs by round."""

    method: plan.Method
    rate: float
    mark: str  # what there is to say of the rate
    runs: dict[int, list[records.Line]]
    costs: dict[int, records.Line]
    full: dict[int, records.Line]  # full fine-tuning's costs by round

    @property
    def trainable(self) -> int:
        """Return how many values it trains."""
        return int(next(iter(self.runs.values()))[-1]["trainable"])

    def ends(self) -> list[records.Line]:
        """Return the last line of each run that did not diverge."""
        return [lines[-1] for lines in self.runs.values() if "test" in lines[-1]]


def gather(experiment: plan.Experiment, results: Path) -> list[Result]:
    """Return what was run of an experiment as its file stands now."""
    cells = records.read(results)
    ends_of_grid = (min(experiment.rates), max(experiment.rates))
    costs: dict[plan.Method, dict[int, records.Line]] = {}
    for cell in plan.costs(experiment):
        if cell.key in cells:
            start, *_, end = cells[cell.key]
            costs.setdefault(cell.method, {})[cell.seed] = start | end
    by_method: dict[plan.Method, Result] = {}
    for cell in plan.finals(experiment, records.scores(cells)):
        if cell.key not in cells:
            continue
        searched = len(experiment.rates) > 1
        mark = "=" if cell.method in experiment.like else "*" if cell.rate in ends_of_grid else ""
        cost = costs.get(cell.method.timed, {})
        full = costs.get(plan.FULL, {})
        new = Result(cell.method, cell.rate, mark if searched else "", {}, cost, full)
        by_method.setdefault(cell.method, new).runs[cell.seed] = cells[cell.key]
    used = [lines for result in by_method.values() for lines in result.runs.values()]
    searched = [cell.key for method in by_method for cell in plan.tuning(experiment, method)]
    used += [cells[key] for key in searched if key in cells]
    if len({lines[0]["data"] for lines in used}) > 1:
        raise SystemExit(
            f"the cells of {experiment.name} are of different data or base models and cannot be "
            "compared: run them again on one, in an empty folder of results"
        )
    return [by_method[method] for method in experiment.methods if method in by_method]


def baseline_of(result: Result, results: list[Result], name: str) -> Result | None:
    """Return the method of that name and length with as many values within 2%, if there is one.

    Of one side alone a rank of nearly twice that of both has the same number of values.
    """
    alike = [
        r
        for r in results
        if r.method.name == name
        and r.method.length == result.method.length
        and abs(r.trainable - result.trainable) <= 0.02 * r.trainable
    ]
    return None if result in alike else next(iter(alike), None)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half-width of its 95% interval (Student's t)."""
    n = len(values)
    if n < 2:
        return values[0], float("nan")
    return mean(values), float(student.ppf(0.975, n - 1)) * stdev(values) / n**0.5


def geometric(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the geometric mean with the ends of its 95% interval."""
    middle, half = interval([math.log(max(value, ROUNDING)) for value in values])
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def loss_on_test(end: records.Line) -> float:
    """Return what a last line says of test."""
    return float(end["test"]["loss"])


def pairs(
    result: Result, baseline: Result, value: Callable[[records.Line], float] = loss_on_test
) -> list[tuple[float, float]]:
    """Return a value of the last lines of both, seed by seed."""
    return [
        (value(of[-1]), value(baseline.runs[seed][-1]))
        for seed, of in result.runs.items()
        if seed in baseline.runs and "test" in of[-1] and "test" in baseline.runs[seed][-1]
    ]


def time_ratio(result: Result) -> float | None:
    """Return the time of a run, draws included, over full fine-tuning's: the median over rounds.

    Only where both had their turns in one run: at another hour the machine was another.
    """
    ratios = [
        seconds(cost, result) / float(result.full[round]["step_seconds"])
        for round, cost in result.costs.items()
        if round in result.full and result.ends()
        if cost["run"] == result.full[round]["run"]
    ]
    return median(ratios) if ratios else None


def seconds(cost: records.Line, result: Result) -> float:
    """Return how long a step of a whole run takes, with its part of the draws."""
    end = result.ends()[0]
    return float(cost["step_seconds"] + cost["draw_seconds"] * end["cycles"] / end["steps"])
