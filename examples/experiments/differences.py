"""Figures of differences that are paired by seed, with their 95% intervals."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.experiments import plan
from examples.experiments.marking import COLOURS, End, colour, label, name
from examples.experiments.outcomes import Result, baseline_of, gather, interval, pairs

SUMMARY = [  # what, experiment, ROSA there, and ROSA drawn once
    ("E2E", "e2e", "ROSA", "ROSA, one draw"),
    ("code, ten passes", "code-passes", "ROSA, every 240", "ROSA, one draw"),
    ("code, one pass", "code", "ROSA, every 400", "ROSA, one draw"),
    ("E2E, SmolLM2", "smollm2", "ROSA", ""),
    ("ELI5", "eli5", "ROSA", "ROSA, one draw"),
]


def paired(result: Result, results: list[Result], to: str) -> list[float]:
    """Return the differences of the losses on test to a method of that name, seed by seed."""
    baseline = baseline_of(result, results, to)
    return [a - b for a, b in pairs(result, baseline)] if baseline else []


def row(axes: Axes, place: float, values: Sequence[float], of: str) -> None:
    """Draw a mean with its 95% interval, of two seeds their range, and each seed as a tick."""
    middle, half = interval(values)
    ends = [[middle - min(values)], [max(values) - middle]] if len(values) == 2 else half
    axes.errorbar(middle, place, xerr=ends, marker="o", ms=5, capsize=3, color=of)
    axes.plot(values, [place] * len(values), "|", color="black", markersize=7)


def zero(axes: Axes, to: str, rows: int) -> None:
    """Mark where there is no difference, across a figure of rows, and the better side."""
    axes.axvline(0, color="black", linewidth=1)
    axes.set_title(f"difference to {to}", fontsize="medium")
    axes.set_ylim(-rows + 0.4, 0.6)
    axes.locator_params(axis="x", nbins=6)
    below = {"textcoords": "offset points", "fontsize": "small", "va": "top"}
    for text, side, shift in (("← better", "right", -4), ("worse →", "left", 4)):
        axes.annotate(text, (0, 0), (shift, -20), axes.get_xaxis_transform(), ha=side, **below)


def rows(drawing: Figure, results: list[Result], figure: dict[str, Any]) -> None:
    """Draw the differences on test, a row for each method and a panel for each of `to`."""
    found = [(r, [paired(r, results, to) for to in figure["to"]]) for r in results]
    found = [(result, values) for result, values in found if any(values)]
    drawing.set_figheight(1.7 + 0.3 * len(found))
    panels = drawing.subplots(1, len(figure["to"]), sharey=True, squeeze=False)[0]
    for panel, (axes, to) in enumerate(zip(panels, figure["to"], strict=True)):
        for place, (result, values) in enumerate(found):
            if values[panel]:
                row(axes, -place, values[panel], colour(result.method))
        zero(axes, to, len(found))
    names = [name(result.method, results) for result, _ in found]
    panels[0].set_yticks(range(0, -len(found), -1), names)


def lengths(drawing: Figure, results: list[Result], figure: dict[str, Any]) -> None:
    """Draw the differences on test over the length of the run."""
    _over(drawing, results, figure, "steps", lambda r: int(r.ends()[0]["steps"]))


def ranks(drawing: Figure, results: list[Result], figure: dict[str, Any]) -> None:
    """Draw the differences on test over the rank."""
    _over(drawing, results, figure, "rank r", lambda r: r.method.rank)


def _over(
    drawing: Figure, results: list[Result], figure: dict[str, Any], by: str, place: Any
) -> None:
    """Draw a line for each name; it breaks where others have a point and it has none."""
    axes, to = drawing.subplots(), figure["to"][0]
    lines: dict[str, dict[int, tuple[float, float]]] = {}
    of = {}
    for result in results:
        if values := paired(result, results, to):
            lines.setdefault(result.method.name, {})[place(result)] = interval(values)
            of[result.method.name] = colour(result.method)
    marks = sorted({x for points in lines.values() for x in points})
    axes.set_xscale("log")
    ends = []
    for i, (line, points) in enumerate(lines.items()):
        own = [x for x in marks if min(points) <= x <= max(points)]
        x = [at * 1.03 ** (i - (len(lines) - 1) / 2) for at in own]  # beside each other
        middle, half = zip(*(points.get(at, (math.nan,) * 2) for at in own), strict=True)
        axes.errorbar(x, middle, half, marker="o", ms=5, capsize=3, color=of[line])
        ends.append(End(x[-1], middle[-1], line, of[line]))
    axes.axhline(0, color="black", linewidth=1)
    axes.set_xticks(marks, [f"{mark:,}" for mark in marks])
    axes.set_xticks([], minor=True)
    axes.set(xlabel=by, ylabel=figure["y"])
    _label_baseline(axes, ends, to)


def _label_baseline(axes: Axes, ends: list[End], to: str) -> None:
    """Write the names at the ends of the lines; that of the baseline, with the side, at zero."""
    of = COLOURS["lora", False]
    label(axes, [*ends, End(axes.get_xlim()[1], 0, f"{to} (below: better)", of)])


def steps(drawing: Figure, results: list[Result], figure: dict[str, Any]) -> None:
    """Draw the differences of the losses on dev over the steps, a panel for each rank."""
    compared = [(r, baseline_of(r, results, figure["to"][0])) for r in results]
    ranks = sorted({result.method.rank for result, baseline in compared if baseline})
    panels = drawing.subplots(1, max(1, len(ranks)), sharey=True, squeeze=False)[0]
    for axes, rank in zip(panels, ranks, strict=False):
        here = [(r, b) for r, b in compared if b and r.method.rank == rank]
        for i, (result, baseline) in enumerate(here):
            apart: dict[int, list[float]] = {}
            for seed in result.runs.keys() & baseline.runs.keys():
                others = _dev(baseline, seed)
                for step, loss in _dev(result, seed).items():
                    apart.setdefault(step, []).append(loss - others[step])
            x, of = sorted(apart), colour(result.method)
            middle, half = map(np.array, zip(*(interval(apart[s]) for s in x), strict=True))
            axes.plot(x, middle, color=of, marker="o", ms=3)
            axes.fill_between(x, middle - half, middle + half, color=of, alpha=0.15, linewidth=0)
            corner = {"transform": axes.transAxes, "color": of, "fontsize": "small", "va": "top"}
            axes.text(0.05, 0.98 - 0.07 * i, result.method.name, **corner)
        axes.axhline(0, color="black", linewidth=1)
        axes.set_title(f"r = {rank}", fontsize="medium")
        axes.set_xlabel("steps")
    panels[0].set_ylabel(figure["y"])


def _dev(result: Result, seed: int) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in result.runs[seed] if line["event"] == "dev"}


def summary(drawing: Figure, results: Path) -> None:
    """Draw ROSA's differences to LoRA on the tasks of text, resampled and drawn once."""
    axes = drawing.subplots()
    places, names = [], []
    for what, experiment, resampled, once in SUMMARY:
        found = gather(plan.load(experiment), results)
        for result in (r for r in found if r.method.name == resampled):
            places.append(-len(places))
            names.append(f"{what}, r = {result.method.rank}")
            row(axes, places[-1] + 0.15, paired(result, found, "LoRA"), colour(result.method))
            for other in found:
                if other.method.name == once and other.method.rank == result.method.rank:
                    row(axes, places[-1] - 0.2, paired(other, found, "LoRA"), colour(other.method))
    axes.set_yticks(places, names)
    zero(axes, "LoRA on test (nats a token)", len(places))
    for y, text, resampled in ((0.22, "ROSA, resampled", True), (0.16, "ROSA, one draw", False)):
        of = COLOURS["random", resampled]
        axes.text(0.05, y, text, color=of, transform=axes.transAxes)
