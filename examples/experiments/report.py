"""Tables and figures, from the lines of the finished cells alone."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from examples.experiments import figures as drawing
from examples.experiments import plan, records
from examples.experiments.outcomes import (
    Result,
    baseline_of,
    gather,
    geometric,
    interval,
    pairs,
    time_ratio,
)

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
    "exact_match": "exact match",
}

COLUMNS = """\
- ±: the 95% interval of the mean (Student's t).
- *to LoRA*, or to another method: the difference at as many values (within 2%), paired by seed. A
  negative one is an advantage where the score is a loss.
- *on dev*: the same difference of the best losses on dev, which the weights were chosen by. Of
  GLUE it is the *loss on the tenth of train*.
- Errors that span decades (regression) have the geometric mean [its 95% interval]. *over LoRA's*
  is the ratio, likewise. What is below the square of float64's rounding, 5e-32, counts as that.
- *values*: how many are trained.
- *rate*: the best of one grid for all methods, by dev, on one seed beside those published. \\* is
  an end of the grid, = a rate that is taken over from another method.
- *n*: seeds.
- *MiB*: the peak of training above the imports. It is mostly data and activations where the model
  is small.
- *time*: of a whole run with its draws over full fine-tuning's, from median steps. The methods
  take turns with nothing else running. Full fine-tuning has its turn in every round, in the table
  or not. Cycles that are solved exactly have neither time nor MiB."""
POLICIES = {
    "regression": "All weights are matrices; there are no biases.",
    "glue": "full trains every parameter; the others the matrices of the encoder's linear layers "
    "and the new head, at one rate, with embeddings, biases and norms frozen.",
}
POLICY = (
    "full trains every parameter; the others the matrices of the linear layers, with embeddings, "
    "biases and norms frozen."
)


def table(experiment: plan.Experiment, results: list[Result]) -> str:
    """Return the table of an experiment as Markdown: what it says first, how it was run last."""
    ends = [end for result in results for end in result.ends()]
    if not ends:
        return "(no finished cell)"
    task = experiment.setting["task"].partition("/")[0]
    decades = task == "regression"
    names = NAMES | ({"loss": "relative error"} if decades else {})
    first, *others = [key for key in ends[0]["test"] if key != "loss" or task != "glue"]
    written = list(ends[0].get("generated", {}))
    scores = [("test", key) for key in others] + [("generated", key) for key in written]
    chosen_by = "loss on the tenth of train" if task == "glue" else "on dev"
    heads = ["method", names.get(first, first)]
    for name in experiment.compare:
        own = [f"to {name} ({heads[1]})", chosen_by]
        heads += [f"over {name}'s"] if decades else own
    heads += [names.get(key, key) for _, key in scores]
    heads += ["values", "rate", "n", "MiB", "time"]
    rows = []
    for result in results:
        row = [result.method.label, _score(result, "test", first, decades)]
        for name in experiment.compare:
            row += _compared(result, results, name, first, decades)
        row += [_score(result, *score, decades) for score in scores]
        rows.append([*row, *_how_run(result)])
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


def _score(result: Result, part: str, key: str, decades: bool) -> str:
    """Return a score of the runs that did not diverge."""
    values = [end[part][key] for end in result.ends()]
    return "" if not values else ranged(values) if decades else shown(*interval(values))


def _compared(
    result: Result, results: list[Result], name: str, first: str, decades: bool
) -> list[str]:
    """Return how the method differs from another: in its score, and by what chose the weights."""
    baseline = baseline_of(result, results, name)
    values = [lambda end: float(end["test"][first]), lambda end: float(end["best"])]
    row = []
    for value in values[:1] if decades else values:
        both = pairs(result, baseline, value) if baseline else []
        if decades:
            row.append(ranged([a / b for a, b in both]) if both else "")
        else:
            row.append(shown(*interval([a - b for a, b in both]), sign=True) if both else "")
    return row


def _how_run(result: Result) -> list[str]:
    """Return the trained values, the rate, the number of seeds, the memory and the time."""
    diverged = len(result.runs) - len(result.ends())
    n = f"{len(result.ends())}{f' ({diverged} diverged)' if diverged else ''}"
    steps = result.method.length and not result.method.solve
    rate = f"{result.rate:g}{result.mark}" if steps else ""
    peaks = [cost["peak_mib"] for cost in result.costs.values()]
    peak = f"{median(peaks):.0f}" if peaks else ""
    ratio = time_ratio(result)
    return [f"{result.trainable:,}", rate, n, peak, f"{ratio:.1f}" if ratio else ""]


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


def published(results: Path) -> bool:
    """Return whether these are the lines that the page and the findings are of."""
    return results.resolve() == plan.RESULTS.resolve()


def places(
    results: Path, page: Path | None, figures: Path | None, own_files: bool
) -> tuple[Path | None, Path]:
    """Return where the tables and the figures go, where none is given.

    The published page has the tables of the published lines, by the files as they are, alone.
    """
    page = page or (plan.FOLDER / "RESULTS.md" if own_files and published(results) else None)
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
    """Draw the figures, put the table into the page where it has a place for it, return it.

    The findings of the files are those of the published lines: others have no such title.
    """
    found = gather(experiment, results)
    text = table(experiment, found)
    asked, of = experiment.figures if found else [], published(results)
    drawn = [drawing.draw(figure, experiment, found, figures, of) for figure in asked]
    if page is not None:
        place(page, experiment.name, text)
    done = "\n".join(f"figure: {path}" for path in drawn)
    return f"{experiment.name}: {experiment.title}\n{text}\n{done}"
