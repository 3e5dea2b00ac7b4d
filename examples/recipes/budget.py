"""Budget where it counts: a rank for each weight, from gradients or spectra, at equal budget.

    python -m examples.recipes.budget [--short] [--out DIR]

An m x n weight with rank r trains r (m + n) values. With a budget for all weights together, ranks
are dealt out one by one: the next goes to the weight where it gains most for its cost,

    gain of the k-th rank / (m + n),    gain = the k-th singular value squared

of the gradient of the weight (where a step of full fine-tuning would change the loss most), or of
the weight itself. `init` takes the result as a mapping from names to ranks. Beside them: the same
rank for all, and, in hindsight, the spectrum of what full fine-tuning changed, which costs a full
fine-tuning to know. Each has the best of the same rates on other data. The seeds of a
method, each with data and draws of its own, train at once by vmap.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import rosa_func
from examples.recipes.allocation import dealt, spectra
from examples.shared.glyphs import CHARACTERS, SANS, SERIF, Glyphs, base_model, glyphs
from examples.shared.options import of_a_recipe
from examples.shared.panels import panels, save

WIDTHS, UNIFORM, BATCH = (128, 128, 128), 2, 64
RATES, TUNED_ON = (1e-3, 3e-3, 1e-2, 3e-2), 3  # seeds
STUDENT = {3: 4.303, 10: 2.262}  # 97.5% quantiles, by the number of values
Weights = Mapping[str, Tensor]


def gradient(model: nn.Module, data: Glyphs) -> Weights:
    """Return the gradient of each weight, as a whole matrix, at the pretrained weights."""

    def loss(weights: Weights) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (data.images,)), data.labels)

    return grad(loss)({name: W.detach() for name, W in model.named_parameters()})


def tuned(
    model: nn.Module, ranks: dict[str, int] | None, rate: float, data: list[Glyphs], steps: int
) -> list[Weights]:
    """Adapt the weights with these ranks, or in full, once for each seed's data, all at once."""
    states = [
        rosa_func.init(model, targets=(), train="*.weight")
        if ranks is None
        else rosa_func.init(model, ranks, key=seed)
        for seed in range(len(data))
    ]
    stacked = torch.stack(states)
    optimizer = torch.optim.AdamW(rosa_func.parameters(stacked), rate, weight_decay=0.0)

    def loss(state: TensorDict, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(rosa_func.call(model, state, images), labels)

    for each in zip(*(d.batches(BATCH, steps, seed) for seed, d in enumerate(data)), strict=True):
        optimizer.zero_grad()
        vmap(loss)(stacked, *map(torch.stack, zip(*each, strict=True))).sum().backward()
        optimizer.step()
    return [rosa_func.merge(state) for state in stacked.detach().unbind(0)]


@torch.no_grad()
def losses(model: nn.Module, results: list[Weights], data: Glyphs) -> Tensor:
    """Return the held-out loss of each."""
    outs = [functional_call(model, weights, (data.images,)) for weights in results]
    return torch.stack([F.cross_entropy(out, data.labels) for out in outs])


def interval(values: Tensor) -> tuple[float, float]:
    """Return the mean and half of its 95% interval, by Student's t."""
    return values.mean().item(), STUDENT[len(values)] * (values.std() / len(values) ** 0.5).item()


def allocations(model: nn.Module, scored: Glyphs, full: Weights) -> dict[str, dict[str, int]]:
    """Return the ranks of each method, all of the same budget."""
    pretrained = {name: W.detach() for name, W in model.named_parameters()}
    costs = {name: sum(W.shape) for name, W in pretrained.items() if W.ndim == 2}
    gains = {
        "gradient": spectra(gradient(model, scored)),
        "spectrum": spectra(pretrained),
        "hindsight": spectra({name: full[name] - W for name, W in pretrained.items()}),
    }
    budget = UNIFORM * sum(costs.values())
    ranks = {name: dealt(gain, costs, budget) for name, gain in gains.items()}
    return {"uniform": dict.fromkeys(costs, UNIFORM)} | ranks


def shifted(task: str, number: int, seed: int) -> Glyphs:
    """Draw data of a task: characters turned, with serifs, or with other names."""
    fonts = SERIF if task == "serif" else SANS
    images, labels = glyphs(fonts, number, seed, turn=45.0 if task == "turned" else 0.0)
    generator = torch.Generator().manual_seed(0)
    names = torch.randperm(len(CHARACTERS), generator=generator)
    return Glyphs(images, names[labels] if task == "renamed" else labels)


def compare(model: nn.Module, task: str, seeds: int, steps: int) -> dict[str, Tensor]:
    """Return held-out losses minus those of uniform ranks, one a seed; print the table."""
    scored, dev, test = (shifted(task, 2000, seed) for seed in range(3))
    data = [shifted(task, 1000, 100 + seed) for seed in range(seeds)]

    def best(ranks: dict[str, int] | None) -> list[Weights]:
        def on_dev(rate: float) -> float:
            few = tuned(model, ranks, rate, data[:TUNED_ON], steps)
            return losses(model, few, dev).mean().item()

        return tuned(model, ranks, min(RATES, key=on_dev), data, steps)

    full = best(None)
    dealt_out = allocations(model, scored, full[0])
    results = {name: (ranks, best(ranks)) for name, ranks in dealt_out.items()}
    print(f"\n{task}: all in full {losses(model, full, test).mean():.3f}")
    print(f"{'':12}{'ranks':>14}{'values':>9}{'loss':>8}{'minus uniform':>19}")
    uniform = losses(model, results["uniform"][1], test)
    differences = {}
    for name, (ranks, found) in results.items():
        each = losses(model, found, test)
        differences[name] = each - uniform
        values = rosa_func.count(rosa_func.init(model, ranks)).trainable
        middle, half = interval(differences[name])
        against = "" if name == "uniform" else f"{middle:+.3f} ± {half:.3f}"
        shown = " ".join(map(str, ranks.values()))
        print(f"{name:12}{shown:>14}{values:>9,}{each.mean():>8.3f}{against:>19}", flush=True)
    return differences


def draw(differences: dict[str, dict[str, Tensor]], path: Path) -> None:
    """Draw the differences to uniform ranks with their intervals, a panel for each task."""
    figure, axes = panels(len(differences), height=2.4)
    names = ("gradient", "spectrum", "hindsight")
    for panel, (task, of) in zip(axes, differences.items(), strict=True):
        for place, name in enumerate(names):
            middle, half = interval(of[name])
            panel.plot(of[name], [-place] * len(of[name]), "|", color="#999999")
            panel.errorbar(middle, -place, xerr=half, fmt="o", capsize=3)
        panel.set_yticks([-place for place in range(len(names))], names)
        panel.set_ylim(-len(names) + 0.5, 0.5)
        panel.axvline(0, color="black", lw=0.8)
        panel.set(title=task, xlabel="loss minus that of uniform ranks")
    save(figure, path, "Which ranks are better than uniform ones depends on the task")


def main() -> None:
    """Adapt to three tasks with each allocation, over some seeds."""
    args = of_a_recipe(__doc__, "few steps and seeds")
    seeds, steps = (3, 10) if args.short else (10, 200)
    model = base_model(WIDTHS, 5 * steps)
    tasks = ("turned", "serif", "renamed")
    draw({task: compare(model, task, seeds, steps) for task in tasks}, args.out / "budget.png")


if __name__ == "__main__":
    main()
