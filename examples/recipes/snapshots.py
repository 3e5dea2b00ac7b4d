"""Uncertainty from one run: snapshots of its cycles as an ensemble, and Laplace over the factors.

    python -m examples.recipes.snapshots [--short] [--out DIR]

A classifier is adapted to 400 noisy rows, and grows too sure of itself. A state is a value, so the
states at the ends of the cycles cost nothing to keep, and one pass by `vmap` evaluates them all:

    ensemble   p(y | x) = mean over snapshots of softmax f(x)
    Laplace    p(y | x) = softmax f(x), softened by how far the factors could be elsewhere

Laplace takes the last state and the curvature around it, with a prior of the width that is best on
400 other rows. Drawn is how often a prediction was right, by how sure it was.

Source: Huang et al. 2017, "Snapshot ensembles"; those of Laplace are in laplace.py.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

import rosa_func
from examples.recipes import costs
from examples.recipes.calibration import calibration, plot
from examples.recipes.laplace import fisher_diagonal, softened
from examples.shared.options import of_a_recipe
from rosa_func import stacking

FEATURES, CLASSES = 16, 4


class Rows(NamedTuple):
    """Rows of a task: inputs, and labels drawn from the probabilities of a teacher."""

    x: Tensor
    y: Tensor


def network(width: int, seed: int) -> nn.Module:
    """Make a network with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, second = nn.Linear(FEATURES, width), nn.Linear(width, width)
        return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(width, CLASSES))


@torch.no_grad()
def rows(teacher: nn.Module, number: int, seed: int) -> Rows:
    """Draw rows of the task of a teacher."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, FEATURES, generator=generator)
    p = (teacher(x) * 8).softmax(-1)
    return Rows(x, torch.multinomial(p, 1, generator=generator)[:, 0])


def train(model: nn.Module, state: TensorDict, data: Rows, steps: int, rate: float) -> None:
    """Train a state, at a rate that falls to zero."""
    leaves = rosa_func.parameters(state)
    optimizer = torch.optim.Adam(leaves, rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(rosa_func.call(model, state, data.x), data.y).backward()
        optimizer.step()
        schedule.step()


def snapshots(model: nn.Module, data: Rows, cycles: int, steps: int) -> list[TensorDict]:
    """Adapt a model in cycles, and return the state at the end of each."""
    found, state = [], rosa_func.init(model, 4)
    for cycle in range(cycles):
        state = rosa_func.resample(state, cycle) if cycle else state
        train(model, state, data, steps, 1e-2)
        found.append(state.detach())
    return found


def nll(p: Tensor, y: Tensor) -> float:
    """Return the mean of -log p of the labels."""
    return float(F.nll_loss(p.log(), y))


@torch.no_grad()
def main() -> None:
    """Adapt once, and compare what was kept of the run."""
    args = of_a_recipe(__doc__, "few steps, rows and rounds")
    steps, number, rounds = (20, 500, 3) if args.short else (60, 4000, 9)
    model, teacher = network(64, seed=0), network(64, seed=1)
    with torch.enable_grad():
        start = rosa_func.init(model, targets=(), train="*")
        train(model, start, rows(teacher, 4000, seed=2), 3 * steps, 1e-2)
        model = rosa_func.export.to_module(model, start)
        last_layer, noise = teacher[-1].weight, torch.Generator().manual_seed(3)
        last_layer.data += 0.1 * torch.randn(last_layer.shape, generator=noise)
        data, dev, test = (rows(teacher, n, seed) for n, seed in ((400, 4), (400, 5), (number, 6)))
        kept = snapshots(model, data, cycles=6, steps=steps)

    def probabilities(state: TensorDict, x: Tensor) -> Tensor:
        return rosa_func.call(model, state, x).softmax(-1)

    last, stacked = kept[-1], stacking.stack(kept)
    at_once = stacking.vmap(probabilities, in_dims=(0, None))
    F_ = fisher_diagonal(model, last, data.x)
    priors = [10.0**k for k in range(-2, 4)]
    prior = min(priors, key=lambda c: nll(softened(model, last, F_, c, dev.x), dev.y))
    predictions = {
        "the last state": probabilities(last, test.x),
        f"{len(kept)} snapshots": at_once(stacked, test.x).mean(0),
        f"Laplace, lambda = {prior:g}": softened(model, last, F_, prior, test.x),
    }
    print(f"{'':24}{'accuracy':>9}{'nats':>7}{'calibration error':>19}")
    found = {name: calibration(p, test.y) for name, p in predictions.items()}
    for name, p in predictions.items():
        right = (p.argmax(-1) == test.y).float().mean()
        print(f"{name:24}{right:>9.3f}{nll(p, test.y):>7.3f}{found[name].error():>19.3f}")
    plot(found, args.out / "snapshots.png")

    few = test.x[:32]
    ways = {
        "at once, by vmap": partial(at_once, stacked, few),
        "one by one": lambda: [probabilities(state, few) for state in kept],
    }
    print(f"\nto predict {len(few)} rows by {len(kept)} snapshots")
    print(costs.table(costs.compared(ways, rounds), against="one by one"))


if __name__ == "__main__":
    main()
