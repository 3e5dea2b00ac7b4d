"""How ROSA's step and resample grow with width and with rank: a part of speed.py."""

from functools import partial
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

import rosa_func
from examples.benchmark.contenders import (
    Settings,
    Times,
    gpt2,
    interleave,
    rosa_of,
    timed,
    tokens,
    train_step,
)


def growth(s: Settings) -> dict[str, Times]:
    """Time a step and a resample at each width, and at each rank, all of them interleaved."""
    points = [("width", width, width, s.ranks[0]) for width in s.widths]
    points += [("rank", rank, s.growth_width, rank) for rank in s.growth_ranks]
    work = {}
    for axis, place, width, rank in points:
        model = gpt2({**s.growth_model, "n_embd": width, "n_head": width // 64})
        state = rosa_func.init(model, rank)
        batch = tokens(model.config, s.batches[0])
        step = partial(train_step, rosa_of(rosa_func.skeleton(model), state), *batch)
        work[axis, place, "step"] = step
        work[axis, place, "resample"] = partial(timed, partial(rosa_func.resample, state, 1))
    times = interleave(work, max(3, s.rounds // 2), 1, "growth")
    return {
        axis: {
            what: {
                str(place): times[axis, place, what]["step" if what == "step" else "seconds"]
                for _, place, *_ in (p for p in points if p[0] == axis)
            }
            for what in ("step", "resample")
        }
        for axis in ("width", "rank")
    }


def plot(times: dict[str, Times], s: Settings, path: Path) -> None:
    """Draw medians, with bands from the first to the third quartile."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    size, layers = "x".join(map(str, s.batches[0])), s.growth_model["n_layer"]
    _panel(left, times["width"], f"rank {s.ranks[0]}", "width of the model (features)", size)
    _panel(right, times["rank"], f"width {s.growth_width}", "rank r (directions)", size)
    left.set_ylabel("time (s)")
    figure.suptitle(f"ROSA on a {layers}-layer GPT-2 (torch threads: {torch.get_num_threads()})")
    figure.savefig(path, dpi=150)


def _panel(axes: Axes, curves: Times, title: str, label: str, size: str) -> None:
    names = {"step": f"training step, batch {size}", "resample": "resample of all weights"}
    for what, points in curves.items():
        places = [int(place) for place in points]
        seconds = torch.tensor(list(points.values()), dtype=torch.float64)
        low, middle, high = seconds.quantile(seconds.new_tensor([0.25, 0.5, 0.75]), dim=1).tolist()
        axes.plot(places, middle, "o-", label=names[what])
        axes.fill_between(places, low, high, alpha=0.3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(places, places)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(title=title, xlabel=label)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
