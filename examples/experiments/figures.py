"""The figures of the experiments: curves over steps, errors over ranks, and bars."""

import math
from pathlib import Path
from statistics import mean, median
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from examples.experiments import plan
from examples.experiments.outcomes import (
    ROUNDING,
    Result,
    baseline_of,
    geometric,
    interval,
    pairs,
    seconds,
)

MARKERS = "osD^vPX*<>" * 9


def draw(
    figure: dict[str, Any], experiment: plan.Experiment, results: list[Result], folder: Path
) -> Path:
    """Draw one figure of an experiment's file; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [r for r in results if r.method.rank in (figure.get("rank", r.method.rank), 0)]
    drawing, axes = plt.subplots(figsize=(9.0, 4.4), layout="constrained")
    if figure.get("log"):
        axes.set_yscale("log")
    KINDS[figure["kind"]](axes, chosen, figure)
    at = f", r = {figure['rank']}" if "rank" in figure else ""
    drawing.suptitle(f"{experiment.title}\n{figure['y']}{at}", fontsize="medium")
    axes.grid(which="both", alpha=0.3)
    path = folder / f"{stem(figure, experiment)}.png"
    drawing.savefig(path, dpi=120)
    plt.close(drawing)
    return path


def stem(figure: dict[str, Any], experiment: plan.Experiment) -> str:
    """Return the name of a figure's file."""
    of = f"-r{figure['rank']}" if "rank" in figure else ""
    return f"{experiment.name}-{figure['kind']}{of}"


def legend(axes: Axes) -> None:
    """Name the lines, beside the axes."""
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))


def curves(axes: Axes, results: list[Result], figure: dict[str, Any]) -> None:
    """Draw the loss on dev over the steps, with its interval; of many methods the mean alone."""
    many = len(results) > 10
    if many:
        axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    for result, marker in zip(results, MARKERS, strict=False):
        points: dict[int, list[float]] = {}
        for lines in result.runs.values():
            for line in lines:
                if line["event"] == "dev":
                    points.setdefault(line["step"], []).append(line["loss"])
        steps = sorted(points)
        middle, low, high = zip(*(spread(points[step], figure) for step in steps), strict=True)
        (line,) = axes.plot(steps, middle, marker=marker, markersize=4, label=result.method.label)
        if not many:
            axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_ylim(figure.get("bottom"), figure.get("top"))
    axes.set(xlabel=figure.get("x", "steps"), ylabel=figure["y"])
    legend(axes)


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


def ranks(axes: Axes, results: list[Result], figure: dict[str, Any]) -> None:
    """Draw the loss on test over the number of trainable values, a line for each method.

    It breaks at a rank that others were run at and the method was not.
    """
    lines: dict[str, dict[int, tuple[float, ...]]] = {}
    for result in results:
        ends = result.ends()
        if ends:
            value = spread([end["test"]["loss"] for end in ends], figure)
            of = lines.setdefault(result.method.name, {})
            of[result.method.rank] = (result.trainable, *value)
    drawn = sorted({rank for points in lines.values() for rank in points})
    for (name, points), marker in zip(lines.items(), MARKERS, strict=False):
        own = [rank for rank in drawn if min(points) <= rank <= max(points)]
        rows = [points.get(rank, (math.nan,) * 4) for rank in own]
        x, middle, low, high = zip(*rows, strict=True)
        below = [m - v for m, v in zip(middle, low, strict=True)]
        above = [v - m for m, v in zip(middle, high, strict=True)]
        axes.errorbar(x, middle, (below, above), marker=marker, ms=5, capsize=3, label=name)
    axes.set(xlabel="trainable values", ylabel=figure["y"])
    logarithmic(axes, [point[0] for points in lines.values() for point in points.values()])
    legend(axes)


def logarithmic(axes: Axes, values: list[float]) -> None:
    """Make the horizontal axis logarithmic, with a mark for each value on it."""
    axes.set_xscale("log")
    axes.set_xticks(sorted(set(values)), [f"{value:,.0f}" for value in sorted(set(values))])
    axes.set_xticks([], minor=True)
    axes.tick_params(axis="x", labelrotation=25)  # those of a high rank are close to each other


def bars(axes: Axes, results: list[Result], figure: dict[str, Any]) -> None:
    """Draw a metric on test of every method, with its 95% interval and every seed, uncut.

    Full fine-tuning has a place only where the figure asks for it: on text it is far off the rest.
    """
    found = [result for result in results if result.ends()][::-1]
    results = [r for r in found if figure.get("full") or r.method.sampler != "full"]
    for place, result in enumerate(results):
        values = [end["test"][figure.get("key", "loss")] for end in result.ends()]
        middle, half = interval(values)
        axes.errorbar(middle, place, xerr=half, marker="o", capsize=4, color="tab:blue")
        axes.plot(values, [place] * len(values), "|", color="black", markersize=9)
    axes.set_yticks(range(len(results)), [result.method.label for result in results])
    axes.set_xlabel(figure["y"])


def spectra(axes: Axes, results: list[Result], figure: dict[str, Any]) -> None:
    """Draw the singular values of the total change at the end, the mean over seeds."""
    for result, marker in zip(results, MARKERS, strict=False):
        found = [lines[-2]["spectrum"] for lines in result.runs.values() if "spectrum" in lines[-2]]
        if found:
            middle = [max(mean(column), 1e-12) for column in zip(*found, strict=True)]
            x = range(1, len(middle) + 1)
            axes.plot(x, middle, marker, ls="-", ms=3, label=result.method.label)
    axes.set(xlabel="index", ylabel=figure["y"], yscale="log", xscale="log", ylim=(1e-4, 1.5))
    legend(axes)


def growth(axes: Axes, results: list[Result], figure: dict[str, Any]) -> None:
    """Draw the effective rank of the total change over the steps, the mean over seeds."""
    for result, marker in zip(results, MARKERS, strict=False):
        points: dict[int, list[float]] = {}
        for lines in result.runs.values():
            for line in lines:
                if "effective_rank" in line and line["step"] > 0:
                    points.setdefault(line["step"], []).append(line["effective_rank"])
        if points:
            values = [mean(points[step]) for step in sorted(points)]
            axes.plot(sorted(points), values, marker, ls="-", ms=4, label=result.method.label)
    axes.set(xlabel="steps", ylabel=figure["y"], yscale="log")
    legend(axes)


def crossing(axes: Axes, results: list[Result], figure: dict[str, Any]) -> None:
    """Draw the difference to plain LoRA on test, paired by seed, over the length of the run."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for result in results:
        baseline = baseline_of(result, results, "LoRA")
        both = pairs(result, baseline) if baseline else []
        if both:
            name = f"{result.method.name} r={result.method.rank}"
            steps = result.ends()[0]["steps"]
            lines.setdefault(name, []).append((steps, *interval([a - b for a, b in both])))
    for (name, points), marker in zip(lines.items(), MARKERS, strict=False):
        x, middle, half = zip(*sorted(points), strict=True)
        axes.errorbar(x, middle, half, marker=marker, markersize=5, capsize=3, label=name)
    axes.axhline(0, color="black", linewidth=1)
    axes.set(xlabel="steps", ylabel=figure["y"])
    logarithmic(axes, [point[0] for points in lines.values() for point in points])
    legend(axes)


def draws(axes: Axes, results: list[Result], figure: dict[str, Any]) -> None:
    """Draw the share of a run's time that goes into drawing subspaces."""
    found = [result for result in results[::-1] if result.ends() and result.costs]
    found = [result for result in found if result.method.every]
    shares = [median(_share(cost, result) for cost in result.costs.values()) for result in found]
    bars = axes.barh([result.method.label for result in found], shares)
    axes.bar_label(bars, [f" {share:.2g}%" for share in shares])
    axes.set_xlabel(figure["y"])
    axes.margins(x=0.15)


def _share(cost: dict[str, Any], result: Result) -> float:
    return 100 * (1 - cost["step_seconds"] / seconds(cost, result))


KINDS = {
    "curves": curves,
    "ranks": ranks,
    "bars": bars,
    "spectra": spectra,
    "growth": growth,
    "crossing": crossing,
    "draws": draws,
}
