"""An experiment of a few methods and a small task, for the tests of the harness."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.experiments import plan, task
from models import randn

RATES = [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]
METHODS = [
    plan.Method("full", "full"),
    plan.Method("LoRA", "lora", rank=2),
    plan.Method("ROSA", "random", rank=2, every=3),
    plan.Method("aligned", "aligned", rank=2, every=3, moments="keep", train="output"),
    plan.Method("importance", "importance", rank=2, every=2, growth=2.0, moments="project"),
    plan.Method("all to the input", "random", rank=2, every=3, share=1.0, rewarm=2),
    plan.Method("sparse only", "lora", budget=2),
    plan.Method("robust", "lora", rank=1, budget=2, begin=2),
    plan.Method("robust, resampled", "random", rank=1, budget=2, begin=2, every=3),
    plan.Method("robust, restarted", "lora", rank=1, budget=2, begin=2, restart=True),
    plan.Method("random support", "lora", rank=1, budget=2, begin=2, support="random"),
]
SETTING = {"task": "regression", "steps": 7, "tune_steps": 3, "warmup": 2, "eval_every": 3}


def experiment(**changes: Any) -> plan.Experiment:
    start = dict.fromkeys(METHODS, RATES[2])
    parts = {"name": "x", "title": "", "setting": SETTING, "rates": RATES, "seeds": [0, 1]}
    parts |= {
        "tune_seed": 9,
        "methods": METHODS,
        "start": start,
        "like": {},
        "times": {},
        "figures": [],
    }
    return plan.Experiment(**(parts | changes))


class RecordingTask:
    """A small regression that records what the training loop asks of it."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []
        self.splits: Counter[str] = Counter()

    def load(self) -> task.Task:
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        model.load_state_dict({k: randn(*v.shape) for k, v in model.state_dict().items()})

        def batches(seed: int) -> Iterator[Tensor]:
            generator = torch.Generator().manual_seed(seed)
            while True:
                yield torch.randn(8, 6, generator=generator)

        def loss(forward: task.Forward, batch: Tensor) -> Tensor:
            self.batches.append(batch)
            return F.mse_loss(forward(batch), batch[:, :4])

        def evaluate(forward: task.Forward, split: str) -> task.Metrics:
            self.splits[split] += 1
            with torch.no_grad():
                return {"loss": F.mse_loss(forward(torch.ones(1, 6)), torch.zeros(1, 4)).item()}

        return task.Task(model, [], batches, loss, evaluate)
