"""Arithmetic of states: soups, task vectors, paths, and a way back that is exact bit for bit.

    python -m examples.recipes.arithmetic [--short] [--out DIR]

A network that reads upright characters without serifs is adapted to others. What came out is a
value, W = R + A B for each weight, and values can be added:

    soup          W0 + mean_i (W_i - W0)             runs on one task that differ in key and order
    task vectors  W0 + c (W_1 - W0) + c (W_2 - W0)   two tasks, and -c to forget one
    path          W0 + t (W_1 - W0)                  from start to end, and beside it the run itself

The weights are averaged, not the factors: A and B of two draws stand for different parts of W, and
even from one draw

    mean(A) mean(B) = mean(A B) - (A_1 - A_2)(B_1 - B_2) / 4

The sum of changes needs no dense matrix: their factors stand side by side, and ranks add.

Sources: Wortsman et al. 2022, "Model soups"; Ilharco et al. 2023, "Editing models with task
arithmetic".
"""

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import functional_call

import rosa_func
from examples.shared.glyphs import SANS, SERIF, Glyphs, base_model, glyphs
from examples.shared.options import of_a_recipe
from examples.shared.panels import panels, save
from rosa_func import checkpoint

RANK, BATCH, RATE, PLACES = 8, 64, 3e-3, 12
Weights = dict[str, Tensor]


def moved(base: Weights, *changes: tuple[float, Weights]) -> Weights:
    """Return W0 + sum_i c_i (W_i - W0)."""
    return {n: W0 + sum(c * (W[n] - W0) for c, W in changes) for n, W0 in base.items()}


def side_by_side(*changes: tuple[float, TensorDict]) -> TensorDict:
    """Return sum_i c_i A_i B_i as one delta, by its factors: A = [c_1 A_1, ...], B = [B_1; ...]."""
    change = {}
    for name in changes[0][1]["change"].keys():
        terms = [(c, delta["change", name]) for c, delta in changes]
        A = torch.cat([c * term["A"] for c, term in terms], dim=-1)
        change[name] = {"A": A, "B": torch.cat([term["B"] for _, term in terms], dim=-2)}
    return TensorDict({"change": change, "full": {}})


def mean_of_factors(*states: tuple[float, TensorDict]) -> TensorDict:
    """Return what looks like an average and is none: R, A and B averaged each by itself."""
    means = {part: sum(c * state[part] for c, state in states) for part in ("frozen", "trainable")}
    return states[0][1].replace(means)


def tuned(
    model: nn.Module, state: TensorDict, data: Glyphs, steps: int, seed: int, cycle: int = 0
) -> tuple[TensorDict, list[Weights]]:
    """Return the trained state, resampled after each cycle, and the weights along the run."""
    optimizer = torch.optim.AdamW(rosa_func.parameters(state), RATE, weight_decay=0.0)
    along = [rosa_func.merge(state)]
    for step, (images, labels) in enumerate(data.batches(BATCH, steps, seed), start=1):
        optimizer.zero_grad()
        F.cross_entropy(rosa_func.call(model, state, images), labels).backward()
        optimizer.step()
        if step % (steps // PLACES) == 0:
            along.append(rosa_func.merge(state))
        if cycle and step % cycle == 0 and step < steps:
            new = rosa_func.resample(state, key=step)
            rosa_func.optim.rebind(optimizer, state, new)
            state = new
    return state.detach(), along


@torch.no_grad()
def loss(model: nn.Module, weights: Weights, data: Glyphs) -> float:
    """Return the held-out loss with these weights."""
    logits = functional_call(model, weights, (data.images,))
    return F.cross_entropy(logits, data.labels).item()


def undo(model: nn.Module, data: Glyphs) -> None:
    """Print what comes back bit for bit, and what does not."""
    weights, exact = dict(model.named_parameters()), rosa_func.init(model, RANK, exact=True)
    A_B = {name: f["A"] @ f["B"] for name, f in exact["trainable"].items()}
    rounded = sum(int(((weights[n] - P) + P != weights[n]).sum()) for n, P in A_B.items())
    for key in range(10):
        exact = rosa_func.resample(exact, key)
    merged = rosa_func.merge(exact)
    off = sum(int((merged[name] != W).sum()) for name, W in weights.items())
    print(f"\nW - A B + A B: {rounded:,} entries differ; exact=True and 10 resamples: {off} differ")

    start = rosa_func.init(model, RANK)  # steps write into the leaves, so each run takes a clone
    ends = [tuned(model, start.clone(), data, PLACES, seed=0)[0] for _ in range(2)]
    same = checkpoint.digest(ends[0]) == checkpoint.digest(ends[1])
    print(f"back at the start and trained again: {'the same bits' if same else 'other bits'}")


def main() -> None:
    """Add, average and walk between fine-tuned models, and go back."""
    args = of_a_recipe(__doc__, "a few dozen steps")
    steps = 4 * PLACES if args.short else 30 * PLACES

    model = base_model((128, 128), steps=3 * steps)
    W0 = {name: W.detach() for name, W in model.named_parameters()}
    turned, serif = glyphs(SANS, 4000, 1, turn=30.0), glyphs(SERIF, 4000, 1)
    held_out = {
        "base": glyphs(SANS, 2000, 2),
        "turned": glyphs(SANS, 2000, 2, turn=30.0),
        "serif": glyphs(SERIF, 2000, 2),
    }
    figure, axes = panels(3)
    ts = torch.linspace(-0.25, 1.25, 13).tolist()

    def of_serif(weights: Weights) -> float:
        return loss(model, weights, held_out["serif"])

    def mean(runs: list[Weights]) -> Weights:
        return moved(W0, *((1 / len(runs), weights) for weights in runs))

    print("soups: runs on characters with serifs, their mean, and what is no mean")
    start = rosa_func.init(model, RANK, key=0)
    draws = [tuned(model, rosa_func.init(model, RANK, key=k), serif, steps, k)[0] for k in range(4)]
    orders = [tuned(model, start.clone(), serif, steps, 10 + k)[0] for k in range(4)]
    for name, states in {"four draws": draws, "one draw, four orders": orders}.items():
        runs = [rosa_func.merge(state) for state in states]
        wrong = rosa_func.merge(mean_of_factors(*((1 / 4, state) for state in states)))
        values = sum(map(of_serif, runs)) / 4, of_serif(mean(runs)), of_serif(wrong)
        print("{:22} alone {:.3f}, weights {:.3f}, factors {:.3f}".format(name, *values))
    one, other = (rosa_func.merge(state) for state in draws[:2])
    path = [moved(W0, (1 - t, one), (t, other)) for t in ts]
    mixed = [rosa_func.merge(mean_of_factors((1 - t, draws[0]), (t, draws[1]))) for t in ts]
    axes[0].plot(ts, list(map(of_serif, path)), label="of the weights")
    axes[0].plot(ts, list(map(of_serif, mixed)), label="of R, A, B")
    axes[0].set(xlabel="between two runs", ylabel="held-out loss")

    print("\ntask vectors: held-out losses")
    both = [tuned(model, start.clone(), task, steps, seed=0)[0] for task in (turned, serif)]
    changes = [checkpoint.delta(state, model) for state in both]
    sums = {"base": (0, 0), "turned": (1, 0), "serif": (0, 1), "sum": (1, 1)}
    sums |= {"half of each": (0.5, 0.5), "turned, negated": (-1, 0)}
    print(f"{'':18}" + "".join(f"{name:>9}" for name in held_out))
    for name, c in sums.items():
        delta = side_by_side(*zip(c, changes, strict=True))
        weights = checkpoint.apply_delta(model, delta)
        print(f"{name:18}" + "".join(f"{loss(model, weights, d):9.3f}" for d in held_out.values()))
    scaled = [side_by_side(*((t, change) for change in changes)) for t in ts]
    added = [checkpoint.apply_delta(model, delta) for delta in scaled]
    for name, data in held_out.items():
        axes[1].plot(ts, [loss(model, weights, data) for weights in added], label=name)
    axes[1].set(xlabel="c of both task vectors")

    _, along = tuned(model, start.clone(), serif, steps, seed=0, cycle=steps // 3)
    line = [of_serif(moved(W0, (t, along[-1]))) for t in ts]
    axes[2].plot(ts, line, label="straight to the end")
    run = list(map(of_serif, along))
    axes[2].plot(torch.linspace(0, 1, len(run)), run, label="the run, of three cycles")
    axes[2].set(xlabel="from start to end")
    half = of_serif(mean(along[len(along) // 2 :]))
    print(f"\na run: its end {run[-1]:.3f}, the mean of its second half {half:.3f}")
    undo(model, serif)
    for panel in axes:
        panel.legend(fontsize="small")
    title = "Averages are of weights, not of factors; of two tasks add half of each"
    save(figure, args.out / "arithmetic.png", title)


if __name__ == "__main__":
    main()
