"""How the figures mark a method: one colour everywhere, names at the ends of lines."""

from itertools import pairwise
from typing import NamedTuple

from matplotlib.axes import Axes

from examples.experiments.outcomes import Result
from examples.experiments.plan import Method

COLOURS = {  # by what trains, or by sampler, and whether it is resampled
    ("full", False): "#444444",
    ("lora", False): "#d55e00",
    ("lora", True): "#8c510a",
    ("random", False): "#56b4e9",
    ("random", True): "#0072b2",
    ("additive", True): "#009e73",
    ("projection", True): "#cc79a7",
    ("bottom", True): "#e69f00",
    ("top", True): "#999999",
    ("aligned", True): "#6a3d9a",
    ("importance", True): "#a6a300",
    ("haar", False): "#b2df8a",
    ("antisymmetric", False): "#fb9a99",
    ("top", False): "#bdbdbd",
    ("bottom", False): "#fdbf6f",
    ("sparse", False): "#7b3294",
    ("robust", False): "#008837",
    ("robust", True): "#1b9e77",
    ("random support", False): "#c2a5cf",
}
APART = 0.058  # of the height of an axis: what two lines of small text need
DASHES = {1: ":", 2: ":", 4: "--", 8: "-.", 16: "-"}  # by rank, where a figure has several


class End(NamedTuple):
    """Where a line ends, and what is written there."""

    x: float
    y: float
    text: str
    colour: str


def kind(method: Method) -> tuple[str, bool]:
    """Return what has a colour: the sparse part or the sampler, and whether it is resampled."""
    sparse = "robust" if method.rank else "sparse"
    sparse = "random support" if method.support == "random" else sparse
    return sparse if method.budget else method.sampler, bool(method.every)


def colour(method: Method) -> str:
    """Return the colour of a method."""
    return COLOURS.get(kind(method), "black")


def name(method: Method, results: list[Result]) -> str:
    """Return the name of a method, with its rank where the figure has several."""
    several = len({r.method.rank for r in results if r.method.rank}) > 1
    return method.label if several else method.name


def label(axes: Axes, ends: list[End]) -> None:
    """Write the names at the ends of the lines, apart from each other.

    One that ends outside of the axis has its value with the name, and an arrow.
    """
    bottom, top = axes.get_ylim()
    inside = [min(max(end.y, bottom), top) for end in ends]
    to_axes = axes.transData + axes.transAxes.inverted()
    at = {i: to_axes.transform((ends[i].x, y))[1] for i, y in enumerate(inside)}
    order = sorted(at, key=lambda i: (at[i], ends[i].y, i))
    for _ in range(200):
        for a, b in pairwise(order):
            lack = max(0.0, APART - (at[b] - at[a]))
            at[a], at[b] = at[a] - lack / 2, at[b] + lack / 2
    for i, (end, y) in enumerate(zip(ends, inside, strict=True)):
        arrow = "" if y == end.y else f": {end.y:.2g} {'↓' if end.y < y else '↑'}"
        axes.annotate(
            end.text + arrow,
            (end.x, y),
            (1.04, at[i]),
            textcoords="axes fraction",
            color=end.colour,
            fontsize="small",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": end.colour, "linewidth": 0.6, "shrinkB": 0},
        )


def full_at(axes: Axes, value: float) -> None:
    """Mark full fine-tuning: by a line across the axes, or by a note where it is beyond them."""
    bottom, top = axes.get_ylim()
    look = {"color": COLOURS["full", False], "fontsize": "small", "va": "bottom"}
    text = f"full fine-tuning: {value:.3g}"
    if bottom <= value <= top:
        axes.axhline(value, color=look["color"], linewidth=1, linestyle="--")
        axes.annotate(text, (0.01, value), xycoords=("axes fraction", "data"), **look)
    else:
        beyond = "below the axis ↓" if value < bottom else "above the axis ↑"
        axes.annotate(f"{text}, {beyond}", (0.01, 0.02), xycoords="axes fraction", **look)
