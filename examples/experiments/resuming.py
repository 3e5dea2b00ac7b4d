"""A run that was stopped on its way goes on from its checkpoint, to the same bits."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict

import rosa_func
from examples.experiments.adapting import Adaptation
from examples.experiments.records import Line

EVERY = 300.0  # seconds between two checkpoints, at least


class Progress(NamedTuple):
    """How far a run is: before the evaluation of that step."""

    step: int
    seconds: float  # of training
    loss: float  # of the last step
    best: float
    kept: TensorDict  # the state that was best on dev
    lines: list[Line]


def save(path: Path, run: Adaptation, progress: Progress) -> None:
    """Write what a run needs to go on; its first state comes from its seed again."""
    parts: dict[str, Any] = progress._asdict()
    parts |= {"optimizer": run.optimizer.state_dict(), "generator": torch.get_rng_state()}
    rosa_func.checkpoint.save(path, run.state, **parts)


def load(path: Path | None, run: Adaptation, start: Line) -> Progress:
    """Return where a run goes on, and put it there: at its first step where there is no checkpoint.

    One of other data, another machine or other versions is passed over: the bits would differ.
    """
    first = Progress(0, 0.0, 0.0, math.inf, run.state, [start])
    if path is None or not path.exists():
        return first
    state, parts = rosa_func.checkpoint.load(path)
    if parts["lines"][0] != start:
        return first
    run.state = state
    run.optimizer = run.new_optimizer()
    run.optimizer.load_state_dict(parts.pop("optimizer"))
    torch.set_rng_state(parts.pop("generator"))
    return Progress(**parts)
