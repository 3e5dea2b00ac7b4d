"""Tables and figures, from the lines of the finished cells alone."""

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

from scipy.stats import t as student

from . import plan, records

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


class Result(NamedTuple):
    """The finished published cells of one method, one for each seed, and its rate."""

    method: plan.Method
    rate: float
    edge: bool  # the rate is at an end of the grid
    runs: dict[int, list[records.Line]]

    def ends(self) -> list[records.Line]:
        """Return the last line of each run that did not diverge."""
        return [lines[-1] for lines in self.runs.values() if "test" in lines[-1]]


def gather(experiment: plan.Experiment, results: Path) -> list[Result]:
    """Return what was run of an experiment as its file stands now."""
    cells = records.read(results)
    scores = records.scores(cells)
    by_method: dict[plan.Method, Result] = {}
    for cell in plan.finals(experiment, scores):
        if cell.key in cells:
            edge = (
                len(experiment.rates) > 1
                and cell.rate in experiment.rates[:: len(experiment.rates) - 1]
            )
            result = by_method.setdefault(cell.method, Result(cell.method, cell.rate, edge, {}))
            result.runs[cell.seed] = cells[cell.key]
    return [by_method[method] for method in experiment.methods if method in by_method]


def is_baseline(method: plan.Method) -> bool:
    """Return whether a method is plain LoRA, which the others of its rank are compared with."""
    return method._replace(name="", rank=0, length=1.0) == plan.Method("", "lora")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half-width of its 95% interval (Student's t)."""
    n = len(values)
    if n < 2:
        return values[0], float("nan")
    return mean(values), float(student.ppf(0.975, n - 1)) * stdev(values) / n**0.5


def difference(result: Result, baseline: Result, key: str = "loss") -> tuple[float, float] | None:
    """Return the interval of the difference of a test metric, paired by seed."""
    pairs = [
        (of[-1]["test"][key], baseline.runs[seed][-1]["test"][key])
        for seed, of in result.runs.items()
        if seed in baseline.runs and "test" in of[-1] and "test" in baseline.runs[seed][-1]
    ]
    return interval([a - b for a, b in pairs]) if pairs else None


def table(results: list[Result], setting: dict[str, Any]) -> str:
    """Return the table of an experiment as Markdown."""
    ends = [end for result in results for end in result.ends()]
    if not ends:
        return "(no finished cell)"
    language = "ppl" in ends[0]["test"]
    keys = [k for k in ends[0]["test"] if k != "loss" or len(ends[0]["test"]) == 1 or language]
    written = list(ends[0].get("generated", {}))
    first = keys[0]
    heads = ["method", "values", "rate", "n", *(NAMES.get(k, k) for k in [*keys, *written])]
    if setting["task"].startswith("regression"):
        heads[4] = "relative error"
    heads += [f"to LoRA ({heads[4]})", "MiB", "time"]
    baselines = {(r.method.rank, r.method.length): r for r in results if is_baseline(r.method)}
    full = next((r for r in results if r.method.sampler == "full"), None)
    rows = []
    for result in results:
        own = result.ends()
        if not own:
            continue
        rate = "" if result.method.solve else f"{result.rate:g}{'*' if result.edge else ''}"
        row = [result.method.label, f"{own[0]['trainable']:,}", rate, str(len(own))]
        row += [shown(*interval([end["test"][k] for end in own])) for k in keys]
        row += [shown(*interval([end["generated"][k] for end in own])) for k in written]
        baseline = baselines.get((result.method.rank, result.method.length))
        apart = None
        if baseline is not None and baseline is not result:
            apart = difference(result, baseline, first)
        row.append(shown(*apart, sign=True) if apart else "")
        row.append(f"{median(end['peak_mib'] for end in own):.0f}")
        row.append(f"{time_ratio(result, full):.2f}" if full and full.ends() else "")
        rows.append(row)
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def time_ratio(result: Result, full: Result) -> float:
    """Return the median over seeds of the time of all steps over that of full fine-tuning."""
    seconds = {s: lines[-1]["seconds"] for s, lines in full.runs.items()}
    typical = median(seconds.values())
    return median(r[-1]["seconds"] / seconds.get(s, typical) for s, r in result.runs.items())


def shown(value: float, half: float, sign: bool = False) -> str:
    """Return a mean with its half-width, to the digits that the half-width leaves sure."""
    plus = "+" if sign else ""
    if half != half or half == 0:
        return f"{value:{plus}.4g}"
    if abs(value) < 1e-3 and not sign:
        return f"{value:.1e} ± {half:.0e}"
    digits = min(4, max(0, 1 - _exponent(half)))
    return f"{value:{plus}.{digits}f} ± {half:.{digits}f}"


def _exponent(value: float) -> int:
    return int(f"{value:e}".split("e")[1])


def write(experiment: plan.Experiment, results: Path, figures: Path, page: Path | None) -> str:
    """Draw the figures, put the table into the page where it has a place for it, return it."""
    from . import figures as drawing

    found = gather(experiment, results)
    text = table(found, experiment.setting)
    drawn = [drawing.draw(f, experiment, found, figures) for f in experiment.figures if found]
    if page is not None and page.exists():
        start, end = f"<!-- {experiment.name} -->", f"<!-- end of {experiment.name} -->"
        old = page.read_text(encoding="utf-8")
        place = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
        page.write_text(place.sub(lambda _: f"{start}\n{text}\n{end}", old), encoding="utf-8")
    done = "\n".join(f"figure: {path}" for path in drawn)
    return f"{experiment.name}: {experiment.title}\n{text}\n{done}"
