"""Tables and figures, from the lines of the finished cells alone."""

import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

from scipy.stats import t as student

from examples.experiments import plan, records

NAMES = {
    "loss": "NLL",
    "ppl": "perplexity",
    "bits": "bits a token",
    "bleu": "BLEU",
    "nist": "NIST",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
    "matthews": "Matthews",
    "f1": "F1",
    "spearman": "Spearman",
}

ROUNDING = 2.0**-104  # of float64, squared
COLUMNS = """\
- *values*: how many are trained;
- *rate*: the best of one grid for all methods, by dev, on one seed beside those published (\\* at
  an end of the grid, = taken over from another method);
- *n*: seeds; ±: 95% interval of the mean (Student's t);
- *to LoRA*, or to another method: the difference at as many values (within 2%), paired by seed, so
  that a negative one is an advantage where the metric is a loss; *on dev*, of GLUE *loss on the
  tenth of train*, that of the best losses there, which the weights were chosen by;
- errors that span decades (regression) have the geometric mean [its 95% interval], *over LoRA's* is
  the ratio, likewise; what is below the square of float64's rounding, 5e-32, counts as that;
- *MiB*: peak of training above the imports, mostly data and activations where the model is small;
- *time*: of a whole run with its draws over full fine-tuning's, from median steps, in turn with
  nothing else running: full fine-tuning has its turn in every round, in the table or not; cycles
  that are solved exactly have neither time nor MiB."""
POLICIES = {
    "regression": "All weights are matrices; there are no biases.",
    "glue": "full trains every parameter; the others the matrices of the encoder's linear layers "
    "and the new head, at one rate, with embeddings, biases and norms frozen.",
}
POLICY = (
    "full trains every parameter; the others the matrices of the linear layers, with embeddings, "
    "biases and norms frozen."
)


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
        cost = costs.get(cell.method._replace(length=1.0), {})
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


def table(experiment: plan.Experiment, results: list[Result]) -> str:
    """Return the table of an experiment as Markdown."""
    ends = [end for result in results for end in result.ends()]
    if not ends:
        return "(no finished cell)"
    task = experiment.setting["task"].partition("/")[0]
    keys = [key for key in ends[0]["test"] if key != "loss" or task != "glue"]
    written = list(ends[0].get("generated", {}))
    decades = task == "regression"
    names = NAMES | ({"loss": "relative error"} if decades else {})
    heads = ["method", "values", "rate", "n", *(names.get(key, key) for key in [*keys, *written])]
    first = names.get(keys[0], keys[0])
    chosen_by = "loss on the tenth of train" if task == "glue" else "on dev"
    differences = [lambda end: float(end["test"][keys[0]]), lambda end: float(end["best"])]
    for name in experiment.compare:
        heads += [f"over {name}'s"] if decades else [f"to {name} ({first})", chosen_by]
    heads += ["MiB", "time"]
    rows = []
    for result in results:
        own, method = result.ends(), result.method
        diverged = len(result.runs) - len(own)
        n = f"{len(own)}{f' ({diverged} diverged)' if diverged else ''}"
        rate = "" if method.solve else f"{result.rate:g}{result.mark}"
        row = [method.label, f"{result.trainable:,}", rate, n]
        for part, key in [("test", k) for k in keys] + [("generated", k) for k in written]:
            values = [end[part][key] for end in own]
            row.append("" if not own else ranged(values) if decades else shown(*interval(values)))
        for name in experiment.compare:
            baseline = baseline_of(result, results, name)
            for value in differences[:1] if decades else differences:
                both = pairs(result, baseline, value) if baseline else []
                if not both:
                    row.append("")
                elif decades:
                    row.append(ranged([a / b for a, b in both]))
                else:
                    row.append(shown(*interval([a - b for a, b in both]), sign=True))
        peaks = [cost["peak_mib"] for cost in result.costs.values()]
        row.append(f"{median(peaks):.0f}" if peaks else "")
        ratio = time_ratio(result)
        rows.append([*row, f"{ratio:.1f}" if ratio else ""])
    filled = [i for i in range(len(heads)) if any(row[i] for row in rows)]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    text = "\n".join("| " + " | ".join(line[i] for i in filled) + " |" for line in lines)
    measured = {
        f"{cost['cpu']}, {cost['threads']} threads"
        for result in results
        for cost in result.costs.values()
    }
    on = f" MiB and time: {'; '.join(sorted(measured))}." if measured else ""
    return f"{text}\n\n{POLICIES.get(task, POLICY)}{on}"


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


def shown(value: float, half: float, sign: bool = False) -> str:
    """Return a mean with its half-width, to the digits that the half-width leaves sure."""
    plus = "+" if sign else ""
    if half != half or half == 0:
        return f"{value:{plus}.4g}"
    digits = min(4, max(0, 1 - _exponent(half)))
    return f"{value:{plus}.{digits}f} ± {half:.{digits}f}"


def ranged(values: Sequence[float]) -> str:
    """Return the geometric mean with its 95% interval, to two digits."""
    return "{:.2g} [{:.2g}, {:.2g}]".format(*geometric(values))


def spent(results: Path) -> str:
    """Return how many runs there are and how long they trained."""
    ends = [lines[-1] for lines in records.read(results).values()]
    runs = [end["seconds"] for end in ends if "seconds" in end]
    return (
        f"{len(runs):,} runs, those of the searches for a rate among them: {sum(runs) / 3600:.1f} "
        "hours of training on one core each, evaluation and generation not counted."
    )


def _exponent(value: float) -> int:
    return int(f"{value:e}".split("e")[1])


def places(
    results: Path, page: Path | None, figures: Path | None, own_files: bool
) -> tuple[Path | None, Path]:
    """Return where the tables and the figures go, where none is given.

    The published page has the tables of the published lines, by the files as they are, alone.
    """
    published = own_files and results.resolve() == plan.RESULTS.resolve()
    page = page or (plan.FOLDER / "RESULTS.md" if published else None)
    return page, figures or (page.parent if page else results) / "figures"


def placed(page: Path, names: list[str]) -> list[str]:
    """Return the experiments that a page has a place for."""
    content = page.read_text(encoding="utf-8")
    return [name for name in names if f"<!-- {name} -->" in content]


def place(page: Path, name: str, text: str) -> None:
    """Put a text into the page, where it has a place of that name."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    between = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    new, found = between.subn(lambda _: f"{start}\n{text}\n{end}", old)
    if found:
        page.write_text(new, encoding="utf-8")
    else:
        print(f"{page} has no place for this: {start} ... {end}", file=sys.stderr)


def write(experiment: plan.Experiment, results: Path, figures: Path, page: Path | None) -> str:
    """Draw the figures, put the table into the page where it has a place for it, return it."""
    from examples.experiments import figures as drawing

    found = gather(experiment, results)
    text = table(experiment, found)
    drawn = [drawing.draw(f, experiment, found, figures) for f in experiment.figures if found]
    if page is not None:
        place(page, experiment.name, text)
    done = "\n".join(f"figure: {path}" for path in drawn)
    return f"{experiment.name}: {experiment.title}\n{text}\n{done}"
