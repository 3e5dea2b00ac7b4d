"""Curvature and influence: what a training row did to a prediction, without training again.

    python -m examples.recipes.influence [--short] [--out DIR]

The factors t = (A, B) of a small network minimise, over n rows,

    J(t) = (1/n) sum_i loss_i(t) + (damping / 2) |t - t0|^2,    t0 as drawn

The penalty pulls to the draw and not to 0, since A B holds a part of the pretrained weight. Without
row i the minimum moves, and with it, to first order, the loss of a test row:

    loss_test(t without i) - loss_test(t)  =  (1/n) g_test . H^-1 g_i

H is never formed: a product H v is the derivative along v (jvp) of the gradient, and conjugate
gradients solve H x = g_test by such products, once for a test row, whatever n is. In the place of
H there may stand the Fisher matrix of the factors. Both, and the bare products g_test . g_i, are
compared with what happens: one state for each row left out, trained on from t, all by one vmap.
(From the draw some would end in other minima: factors have several.)

Source: Koh and Liang 2017, "Understanding black-box predictions via influence functions".
"""

from collections.abc import Callable
from functools import partial
from statistics import mean

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor
from torch.func import grad, vmap

import rosa_func
from examples.recipes import costs
from examples.recipes.curvature import conjugate_gradients, fisher_matrix, flat, hessian_product
from examples.shared.glyphs import SERIF, base_model, glyphs
from examples.shared.options import of_a_recipe
from examples.shared.panels import panels, save

RANK, DAMPING, TESTED = 2, 0.1, 6
Objective = Callable[..., Tensor]


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's: the correlation of the places that the values have in order."""
    places = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return torch.corrcoef(places)[0, 1].item()


def minimised(objective: Objective, start: TensorDict, weights: Tensor, steps: int) -> TensorDict:
    """Return the minima for each row of weights, (problems, n), from a start for each of them."""
    leaves = start.detach().clone().apply(Tensor.requires_grad_)
    optimizer = torch.optim.LBFGS(
        list(leaves.values(include_nested=True, leaves_only=True)),
        max_iter=steps,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = vmap(objective)(leaves, weights).sum()  # of which each has its own gradient
        total.backward()
        return total

    optimizer.step(closure)
    return leaves.detach()


def main() -> None:
    """Train, predict what each row does to some test rows, and leave each out to see."""
    args = of_a_recipe(__doc__, "few rows and steps")
    n, steps, rounds = (12, 60, 1) if args.short else (80, 200, 9)

    model = base_model((32,), steps=100 if args.short else 1000).double()
    images, labels = glyphs(SERIF, n + TESTED, seed=7)
    images = images.double()
    state = rosa_func.init(model, RANK, key=0)
    t0 = state["trainable"]

    def logits(t: TensorDict, x: Tensor) -> Tensor:
        return rosa_func.call(model, state.replace(trainable=t), x)

    def loss(t: TensorDict, x: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(logits(t, x), label)

    def objective(t: TensorDict, weights: Tensor) -> Tensor:
        each = F.cross_entropy(logits(t, images[:n]), labels[:n], reduction="none")
        return weights @ each + DAMPING / 2 * (flat(t) - flat(t0)).square().sum()

    all_rows = torch.full((1, n), 1 / n, dtype=torch.float64)
    t = minimised(objective, t0.expand(1), all_rows, 10 * steps)[0]
    all_but_one = all_rows - torch.eye(n, dtype=torch.float64) / n
    others = minimised(objective, t.expand(n), all_but_one, steps)

    each_g = flat(vmap(grad(loss), (None, 0, 0))(t, images[:n], labels[:n]), batched=1)
    product = partial(hessian_product, partial(objective, weights=all_rows[0]), t)
    F_damped = fisher_matrix(logits, t, images[:n])
    F_damped.diagonal().add_(DAMPING)
    solved = {
        "Hessian": lambda g: flat(conjugate_gradients(product, g)),
        "Fisher": lambda g: torch.linalg.solve(F_damped, flat(g)),
        "gradients": flat,
    }
    figure, axes = panels(len(solved))
    print(f"rank correlation with training again without a row, {TESTED} test rows, {n} rows")
    for panel, (name, solve) in zip(axes, solved.items(), strict=True):
        predicted, actual, each = [], [], []
        for x, label in zip(images[n:], labels[n:], strict=True):
            predicted.append(each_g @ solve(grad(loss)(t, x, label)) / n)
            actual.append(vmap(loss, (0, None, None))(others, x, label) - loss(t, x, label))
            each.append(rank_correlation(predicted[-1], actual[-1]))
        print(f"{name:10}{mean(each):6.2f}   each:" + "".join(f"{value:6.2f}" for value in each))
        panel.plot(torch.cat(predicted), torch.cat(actual), ".", ms=3)
        panel.set(xlabel=f"predicted: {name}", title=f"rank correlation {mean(each):.2f}")
    axes[0].set_ylabel("change of a test row's loss")
    title = "Curvature tells what a training row did to a test row"
    save(figure, args.out / "influence.png", title)

    g, one = grad(loss)(t, images[n], labels[n]), all_but_one[:1]
    work = {
        f"all {n} rows, predicted": partial(solved["Hessian"], g),
        "one row, by training": partial(minimised, objective, t.expand(1), one, steps),
    }
    print("\nwhat rows did to a test row")
    print(costs.table(costs.compared(work, rounds), against="one row, by training"))


if __name__ == "__main__":
    main()
