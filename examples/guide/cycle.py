"""Draw the picture of the README: one cycle of split, train, merge and resample.

    python -m examples.guide.cycle [FILE]    # default: cycle.png beside this script

Needs matplotlib.
"""

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

FROZEN, TRAINS, NEW = "#c9ced6", "#f2b263", "#6aa5d8"
LEARNT, BOTH = "#e0cdb2", "#c3cdb9"  # a frozen weight with one change in it, and with both
SIDE, THIN = 1.0, 0.2  # of a weight, and the rank of its factors


def box(axes: Axes, x: float, y: float, width: float, height: float, color: str, text: str) -> None:
    """Draw one matrix with its name."""
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="#333333", lw=0.8))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10)


def split(
    axes: Axes, x: float, colors: tuple[str, str], residual: str, factors: tuple[str, str]
) -> None:
    """Draw R + A B."""
    box(axes, x, 0, SIDE, SIDE, colors[0], residual)
    axes.text(x + SIDE + 0.14, SIDE / 2, "+", ha="center", va="center", fontsize=13)
    left = x + SIDE + 0.28
    box(axes, left, 0, THIN, SIDE, colors[1], factors[0])
    box(axes, left + THIN + 0.06, SIDE - THIN, SIDE, THIN, colors[1], factors[1])


def arrow(axes: Axes, start: float, end: float, text: str, below: str = "") -> None:
    """Draw an arrow with the function that makes the step above it."""
    axes.add_patch(
        FancyArrowPatch(
            (start, SIDE / 2), (end, SIDE / 2), arrowstyle="-|>", mutation_scale=13, color="#222222"
        )
    )
    middle = (start + end) / 2
    axes.text(
        middle, SIDE / 2 + 0.1, text, ha="center", va="bottom", fontsize=9, family="monospace"
    )
    axes.text(middle, SIDE / 2 - 0.1, below, ha="center", va="top", fontsize=8.5, color="#444444")


def draw() -> Figure:
    """Return the figure."""
    figure = Figure(figsize=(11.5, 2.2), layout="constrained")
    axes = figure.add_subplot()
    box(axes, 0, 0, SIDE, SIDE, FROZEN, "W")
    axes.text(SIDE / 2, -0.12, "pretrained", ha="center", va="top", fontsize=9)
    arrow(axes, 1.08, 1.92, "init", "split")
    split(axes, 2.0, (FROZEN, TRAINS), "R", ("A", "B"))
    axes.text(3.2, -0.12, "R is frozen, A and B train", ha="center", va="top", fontsize=9)
    arrow(axes, 4.58, 5.62, "resample", "merge, and\nsplit again")
    split(axes, 5.7, (LEARNT, NEW), "R'", ("A'", "B'"))
    axes.text(6.9, -0.12, "another random subspace trains", ha="center", va="top", fontsize=9)
    arrow(axes, 8.28, 9.12, "merge")
    box(axes, 9.2, 0, SIDE, SIDE, BOTH, "W'")
    axes.text(9.7, -0.12, "a plain weight again", ha="center", va="top", fontsize=9)
    axes.add_patch(
        FancyArrowPatch(
            (7.5, SIDE + 0.08),
            (6.0, SIDE + 0.08),
            connectionstyle="arc3,rad=0.6",
            arrowstyle="-|>",
            mutation_scale=13,
            color="#222222",
        )
    )
    axes.text(6.75, SIDE + 0.58, "as often as you like", ha="center", va="bottom", fontsize=8.5)
    axes.set(xlim=(-0.1, 10.3), ylim=(-0.35, 1.85), aspect="equal")
    axes.axis("off")
    return figure


if __name__ == "__main__":
    default = Path(__file__).with_suffix(".png")
    draw().savefig(Path(sys.argv[1]) if len(sys.argv) > 1 else default, dpi=130)
