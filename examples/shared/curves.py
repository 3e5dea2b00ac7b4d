"""What came of methods that were trained alike: a table, and a figure of their curves."""

from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.ticker import LogLocator


class Curve(NamedTuple):
    """What came of one method; `points` are pairs of step and held-out perplexity."""

    trainable: int
    seconds_a_step: float
    points: list[tuple[int, float]]
    resamples: list[int]  # the steps before which new subspaces were drawn


def table(curves: dict[str, Curve]) -> str:
    """Return the results as text."""
    before = next(iter(curves.values())).points[0][1]
    lines = [f"{'method':8}{'trainable values':>18}{'s/step':>9}{'held-out perplexity':>21}"]
    lines.append(f"{'(before)':8}{'':>18}{'':>9}{before:>21.2f}")
    lines += [
        f"{name:8}{curve.trainable:>18,}{curve.seconds_a_step:>9.3f}{curve.points[-1][1]:>21.2f}"
        for name, curve in curves.items()
    ]
    return "\n".join(lines)


def plot(curves: dict[str, Curve], title: str, path: Path) -> None:
    """Draw held-out perplexity over steps, a line for each method, with marks at its resamples."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for (name, curve), marker in zip(curves.items(), "osvD", strict=False):
        steps, values = zip(*curve.points, strict=True)
        (line,) = axes.plot(steps, values, marker=marker, markersize=4, label=name)
        for place, step in enumerate(curve.resamples):
            label = "" if place else f"resamples of {name}"
            axes.axvline(step, color=line.get_color(), ls=":", lw=1.2, zorder=0, label=label)
    axes.set(xlabel="steps", ylabel="held-out perplexity", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.minorticks_off()  # their labels would be powers of ten
    axes.set_title(title)
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
