"""The figures of the experiments: what a file asks for, with its finding as the title."""

import math
from pathlib import Path
from statistics import mean, median
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from examples.experiments import differences, plan
from examples.experiments.marking import DASHES, End, colour, full_at, label, name
from examples.experiments.outcomes import ROUNDING, Result, geometric, interval, seconds


def draw(
    figure: dict[str, Any],
    experiment: plan.Experiment,
    results: list[Result],
    folder: Path,
    published: bool = False,
) -> Path:
    """Draw one figure of an experiment's file; return its path.

    The finding is that of the published lines: figures of other lines have the title alone.
    """
    chosen = [r for r in results if r.method.rank in (figure.get("rank", r.method.rank), 0)]
    drawing = plt.figure(figsize=(8.4, 4.0), layout="constrained")
    draw_kind, caption = KINDS[figure["kind"]]
    draw_kind(drawing, chosen, {"to": list(experiment.compare)} | figure)
    seeds = max(len(result.runs) for result in results)
    bands = "the range over the seeds" if figure.get("log") or seeds == 2 else "95% intervals"
    parts = [experiment.title] * published + [f"{seeds} seeds", caption.format(bands=bands)]
    title = figure["finding"] if published else experiment.title
    path = folder / f"{stem(figure, experiment)}.png"
    return save(drawing, path, title, " · ".join(part for part in parts if part))


def draw_summary(results: Path, folder: Path) -> Path:
    """Draw the figure of all tasks of text; return its path."""
    drawing = plt.figure(figsize=(8.4, 4.8), layout="constrained")
    differences.summary(drawing, results)
    title = "Resampling gains on E2E at low ranks, costs on ELI5, and does little elsewhere"
    caption = f"3 seeds, 2 of SmolLM2 (bars: their range) · {PAIRED}, ticks: seeds"
    return save(drawing, folder / "summary.png", title, caption)


def save(drawing: Figure, path: Path, title: str, caption: str) -> Path:
    """Write a figure: the finding above it, what it is of below."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.suptitle(title, x=0.01, ha="left", fontsize="medium", fontweight="bold")
    drawing.supxlabel(caption, x=0.01, ha="left", fontsize="x-small", color="#555555")
    for axes in drawing.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)
    return path


def stem(figure: dict[str, Any], experiment: plan.Experiment) -> str:
    """Return the name of a figure's file."""
    of = f"-r{figure['rank']}" if "rank" in figure else ""
    return f"{experiment.name}-{figure['kind']}{of}"


def curves(drawing: Figure, results: list[Result], figure: dict[str, Any]) -> None:
    """Draw the loss on dev over the steps, with its band; full fine-tuning as a note."""
    axes, ends = drawing.subplots(), []
    several = len({r.method.rank for r in results if r.method.rank}) > 1
    for result in (r for r in results if r.method.sampler != "full"):
        points = _over_steps(result, "loss")
        steps = sorted(points)
        middle, low, high = zip(*(spread(points[step], figure) for step in steps), strict=True)
        of, dashes = colour(result.method), DASHES.get(result.method.rank, "-") if several else "-"
        axes.plot(steps, middle, color=of, ls=dashes, marker="o", markersize=3)
        axes.fill_between(steps, low, high, color=of, alpha=0.15, linewidth=0)
        ends.append(End(steps[-1], middle[-1], name(result.method, results), of))
    if figure.get("log"):
        axes.set_yscale("log")
    axes.set_ylim(figure.get("bottom"), figure.get("top"))
    axes.set(xlabel=figure.get("x", "steps"), ylabel=figure["y"])
    label(axes, ends)
    for result in (r for r in results if r.method.sampler == "full"):
        points = _over_steps(result, "loss")
        full_at(axes, spread(points[max(points)], figure)[0])


def _over_steps(result: Result, key: str) -> dict[int, list[float]]:
    """Return the values of all seeds by step."""
    points: dict[int, list[float]] = {}
    for lines in result.runs.values():
        for line in lines:
            if line["event"] == "dev" and key in line:
                points.setdefault(line["step"], []).append(line[key])
    return points


def spread(values: list[float], figure: dict[str, Any]) -> tuple[float, float, float]:
    """Return the middle and the ends of its band: the mean and its 95% interval.

    On a logarithmic axis they are the geometric mean, as in the tables, and the range of the
    seeds; the band of two seeds is their range too, as their interval would fill the figure.
    """
    if figure.get("log"):
        kept = [max(value, ROUNDING) for value in values]
        low, high = min(kept), max(kept)
        return min(max(geometric(kept)[0], low), high), low, high  # exp(log(x)) is not x
    middle, half = interval(values)
    if len(values) == 2:
        return middle, min(values), max(values)
    return middle, middle - half, middle + half


def ranks(drawing: Figure, results: list[Result], figure: dict[str, Any]) -> None:
    """Draw the loss on test over the rank, a line for each method; full fine-tuning as a level.

    It breaks at a rank that others were run at and the method was not.
    """
    axes = drawing.subplots()
    lines: dict[str, dict[int, tuple[float, float, float]]] = {}
    of, full = {}, []
    for result in (r for r in results if r.ends()):
        value = spread([end["test"]["loss"] for end in result.ends()], figure)
        if result.method.sampler == "full":
            full.append(value[0])
        else:
            lines.setdefault(result.method.name, {})[result.method.rank] = value
            of[result.method.name] = colour(result.method)
    drawn = sorted({rank for points in lines.values() for rank in points})
    ends = []
    for line, points in lines.items():
        own = [rank for rank in drawn if min(points) <= rank <= max(points)]
        middle, low, high = zip(*(points.get(r, (math.nan,) * 3) for r in own), strict=True)
        below = [m - v for m, v in zip(middle, low, strict=True)]
        above = [v - m for m, v in zip(middle, high, strict=True)]
        axes.errorbar(own, middle, (below, above), marker="o", ms=4, capsize=3, color=of[line])
        ends.append(End(own[-1], middle[-1], line, of[line]))
    if figure.get("log"):
        axes.set_yscale("log")
    axes.set_ylim(figure.get("bottom"), figure.get("top"))
    axes.set_xticks(drawn)
    axes.set(xlabel="rank r", ylabel=figure["y"])
    label(axes, ends)
    for value in full:
        full_at(axes, value)


def bars(drawing: Figure, results: list[Result], figure: dict[str, Any]) -> None:
    """Draw a metric on test of every method, with its 95% interval and every seed, uncut."""
    results = [result for result in results if result.ends()]
    drawing.set_figheight(1.5 + 0.3 * len(results))
    axes = drawing.subplots()
    for place, result in enumerate(results):
        values = [end["test"][figure.get("key", "loss")] for end in result.ends()]
        differences.row(axes, -place, values, colour(result.method))
    axes.set_ylim(-len(results) + 0.4, 0.6)
    axes.set_yticks(range(0, -len(results), -1), [result.method.label for result in results])
    axes.set_xlabel(figure["y"])


def spectra(drawing: Figure, results: list[Result], figure: dict[str, Any]) -> None:
    """Draw the singular values of the total change at the end, the mean over seeds."""
    drawing.set_figheight(5.0)
    axes, least, ends = drawing.subplots(), 1e-4, []
    axes.set(xlabel="index", ylabel=figure["y"], yscale="log", xscale="log", ylim=(least, 1.3))
    for result in results:
        found = [lines[-2]["spectrum"] for lines in result.runs.values() if "spectrum" in lines[-2]]
        if found:
            middle = [max(mean(column), 1e-12) for column in zip(*found, strict=True)]
            of, text = colour(result.method), name(result.method, results)
            axes.plot(range(1, len(middle) + 1), middle, color=of)
            rank = sum(value > least for value in middle)
            if rank == len(middle):
                ends.append(End(rank, middle[-1], text, of))
            else:  # beside the fall of the line
                at = {"rotation": 90, "ha": "right", "va": "bottom", "fontsize": "x-small"}
                axes.text(0.97 * rank, 1.2 * least, text, color=of, **at)
    label(axes, ends)


def growth(drawing: Figure, results: list[Result], figure: dict[str, Any]) -> None:
    """Draw the effective rank of the total change over the steps, the mean over seeds."""
    axes, ends = drawing.subplots(), []
    axes.set(xlabel="steps", ylabel=figure["y"], yscale="log")
    for result in results:
        points = _over_steps(result, "effective_rank")
        steps = [step for step in sorted(points) if step > 0]
        if steps:
            values, of = [mean(points[step]) for step in steps], colour(result.method)
            axes.plot(steps, values, marker="o", ms=3, color=of)
            ends.append(End(steps[-1], values[-1], name(result.method, results), of))
    label(axes, ends)


def draws(drawing: Figure, results: list[Result], figure: dict[str, Any]) -> None:
    """Draw the share of a run's time that goes into drawing subspaces."""
    found = [r for r in results[::-1] if r.ends() and r.costs and r.method.every]
    drawing.set_figheight(1.5 + 0.28 * len(found))
    shares = [median(_share(cost, result) for cost in result.costs.values()) for result in found]
    axes = drawing.subplots()
    for result, share in zip(found, shares, strict=True):
        bar = axes.barh(name(result.method, found), share, color=colour(result.method))
        axes.bar_label(bar, [f" {share:.2g}%"])
    axes.set_xlabel(figure["y"])


def _share(cost: dict[str, Any], result: Result) -> float:
    return 100 * (1 - cost["step_seconds"] / seconds(cost, result))


PAIRED = "paired by seed; bars: 95% intervals"
KINDS = {
    "curves": (curves, "bands: {bands}"),
    "ranks": (ranks, "bars: {bands}"),
    "bars": (bars, "bars: 95% intervals, ticks: seeds"),
    "spectra": (spectra, "means"),
    "growth": (growth, "means"),
    "draws": (draws, ""),
    "differences": (differences.rows, f"{PAIRED}, ticks: seeds"),
    "crossing": (differences.lengths, PAIRED),
    "by-rank": (differences.ranks, PAIRED),
    "gaps": (differences.steps, "paired by seed; bands: 95% intervals"),
}
