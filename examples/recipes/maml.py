"""Learning to adapt: factors from which a few steps on a few points are enough (MAML).

    python -m examples.recipes.maml [--short] [--out DIR]

A task is a sine of its own height and phase, of which five points are known. A network is trained
on all tasks at once and frozen, as R; what it learns is their mean, which is near zero. What
trains, t (the factors A and B, and the biases), adapts to one task by a few steps of gradient
descent. MAML trains the t that these steps start from, by the loss after them, and so through them:

    min over t of  mean over tasks  loss_others(t - rate * grad loss_known(t))

A step of a pure function is an expression, so this is the gradient of a function that calls `grad`,
under `vmap` over the tasks. Beside it: t as it was drawn, t that was trained for as many steps on
the same tasks without steps inside, and MAML that takes the inner steps for constants (first
order). Each adapts at the best of the same rates on tasks of a validation.

Source: Finn, Abbeel and Levine 2017, "Model-Agnostic Meta-Learning", sections 2.2 and 5.1.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import grad, vmap

import rosa_func
from examples.shared.options import of_a_recipe
from examples.shared.panels import panels, save

RANK, WIDTH, KNOWN, STEPS, TASKS, RATE = 4, 40, 5, 3, 25, 0.03
RATES = (0.003, 0.01, 0.03)
Loss = Callable[[TensorDict, "Points"], Tensor]


class Points(NamedTuple):
    """Points of each task, (tasks, points, 1) both."""

    x: Tensor
    y: Tensor


Tasks = tuple[Points, Points]  # what is known, and others of the same sines


def sines(tasks: int, seed: int) -> Tasks:
    """Draw tasks: heights in (0.1, 5), phases in (0, pi), points in (-5, 5)."""
    generator = torch.Generator().manual_seed(seed)
    height, phase = torch.rand(2, tasks, 1, 1, generator=generator)
    x = 10 * torch.rand(tasks, 3 * KNOWN, 1, generator=generator) - 5
    y = (0.1 + 4.9 * height) * torch.sin(x + math.pi * phase)
    return Points(x[:, :KNOWN], y[:, :KNOWN]), Points(x[:, KNOWN:], y[:, KNOWN:])


def adapted(loss: Loss, t: TensorDict, known: Points, rate: float, steps: int) -> TensorDict:
    """Return what some steps of gradient descent make of t, differentiably."""
    for _ in range(steps):
        t = t - grad(loss)(t, known) * rate
    return t


def after(loss: Loss, t: TensorDict, tasks: Tasks) -> Tensor:
    """Return the mean loss of other points after the steps: what MAML minimises."""

    def one(known: Points, others: Points) -> Tensor:
        return loss(adapted(loss, t, known, RATE, STEPS), others)

    return vmap(one)(*tasks).mean()


def first_order(loss: Loss, t: TensorDict, tasks: Tasks) -> Tensor:
    """Return the same, with a gradient that takes the steps for constants."""
    start = t.detach()

    def one(known: Points, others: Points) -> Tensor:
        return loss(t + (adapted(loss, start, known, RATE, STEPS) - start), others)

    return vmap(one)(*tasks).mean()


def before(loss: Loss, t: TensorDict, tasks: Tasks) -> Tensor:
    """Return the mean loss without any step."""
    return vmap(loss, in_dims=(None, 0))(t, tasks[1]).mean()


def meta_trained(state: TensorDict, objective: Callable[..., Tensor], steps: int) -> TensorDict:
    """Return what some steps of Adam make of what trains in the state, on new tasks each time."""
    state = state.detach().clone()
    leaves = rosa_func.parameters(state)
    optimizer = torch.optim.Adam(leaves, 1e-2)
    for seed in range(steps):
        optimizer.zero_grad()
        objective(state["trainable"], sines(TASKS, seed)).backward()
        torch.nn.utils.clip_grad_norm_(leaves, 10.0)
        optimizer.step()
    return state["trainable"].detach()


def curves(loss: Loss, t: TensorDict, tasks: Tasks, rate: float) -> Tensor:
    """Return the loss of the other points of each task after 0, 1, ... steps: (tasks, steps)."""

    def one(known: Points, others: Points) -> Tensor:
        each, new = [], t
        for _ in range(2 * STEPS + 1):
            each.append(loss(new, others))
            new = adapted(loss, new, known, rate, steps=1)
        return torch.stack(each)

    return vmap(one)(*tasks)


def main() -> None:
    """Learn a start, and compare what a few steps make of it and of other starts."""
    args = of_a_recipe(__doc__, "few steps and tasks")
    steps, number = (20, 100) if args.short else (1000, 600)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(1, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh()]
        model = nn.Sequential(*layers, nn.Linear(WIDTH, 1))
    full = rosa_func.init(model, targets=(), train="*")

    def loss(t: TensorDict, points: Points, frozen: TensorDict) -> Tensor:
        y = rosa_func.call(model, frozen.replace(trainable=t), points.x)
        return (y - points.y).square().mean()

    everything = meta_trained(full, partial(before, partial(loss, frozen=full)), steps)
    model.load_state_dict(dict(everything.items()))
    state = rosa_func.init(model, {"2.weight": RANK, "*": 1}, train="*.bias", key=0)
    print(rosa_func.count(state))
    of_state = partial(loss, frozen=state)

    objectives = {"trained without steps": before, "first-order MAML": first_order, "MAML": after}
    starts = {"as drawn": state["trainable"]}
    for name, objective in objectives.items():
        starts[name] = meta_trained(state, partial(objective, of_state), steps)

    validation, test = sines(number, 10**6), sines(number, 10**6 + 1)
    print(f"\nmean squared error of new tasks, {KNOWN} points known ± 95% interval")
    print(f"{'start':24}{'rate':>6}{'no step':>9}{'1 step':>9}{f'{STEPS} steps':>15}")
    figure, (panel,) = panels(1, width=5.6)
    for name, t in starts.items():
        at = {rate: curves(of_state, t, validation, rate)[:, STEPS].mean() for rate in RATES}
        rate = min(at, key=lambda rate: at[rate].nan_to_num(torch.inf))
        each = curves(of_state, t, test, rate)
        middle, half = each.mean(0), 1.96 * each.std(0) / number**0.5
        panel.plot(middle, marker="o", ms=3, label=name)
        panel.fill_between(range(len(middle)), middle - half, middle + half, alpha=0.2, lw=0)
        shown = f"{middle[0]:9.2f}{middle[1]:9.2f}{middle[STEPS]:9.2f} ± {half[STEPS]:.2f}"
        print(f"{name:24}{rate:>6}{shown}")
    panel.axvline(STEPS, color="black", lw=0.8, ls=":", label="as many as in training")
    panel.set(xlabel="steps on a new task", ylabel="mean squared error")
    panel.legend(fontsize="small")
    save(figure, args.out / "maml.png", "A start that was learned adapts in a step")


if __name__ == "__main__":
    main()
