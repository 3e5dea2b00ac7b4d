"""What the recipe of learning to adapt states: the gradient goes through the steps."""

from collections.abc import Callable

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import functional_call

import rosa_func
from examples.recipes.maml import RATE, STEPS, Points, after, first_order, sines
from models import seeded
from references import dense_weights, perturbed

# Float64; three steps, each of sums of fewer than 100 products in a handful of layers, in two ways.
TOLERANCE = 1e-16 * 100 * 100
TASKS = tuple(Points(*(part.double() for part in points)) for points in sines(3, seed=0))


def problem() -> tuple[nn.Module, TensorDict]:
    model = seeded(lambda: nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1))).double()
    return model, perturbed(rosa_func.init(model, 1, train="*.bias"))


def reference(through: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss after the steps and its gradient, task by task, by autograd alone."""
    model, state = problem()
    paths = list(state["trainable"].keys(include_nested=True, leaves_only=True))
    start = [state["trainable"][path].clone().requires_grad_() for path in paths]

    def loss(leaves: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        t = TensorDict(dict(zip(paths, leaves, strict=True)))
        weights = dense_weights(state.replace(trainable=t))
        return (functional_call(model, weights, (x,)) - y).square().mean()

    total = torch.zeros((), dtype=torch.float64)
    for task in range(3):
        leaves = start
        for _ in range(STEPS):
            value = loss(leaves, *(part[task] for part in TASKS[0]))
            gradients = torch.autograd.grad(value, leaves, create_graph=through)
            leaves = [leaf - RATE * g for leaf, g in zip(leaves, gradients, strict=True)]
        total = total + loss(leaves, *(part[task] for part in TASKS[1])) / 3
    return total, dict(zip(map(str, paths), torch.autograd.grad(total, start), strict=True))


def found(objective: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model, state = problem()

    def loss(t: TensorDict, points: Points) -> Tensor:
        out = rosa_func.call(model, state.replace(trainable=t), points.x)
        return (out - points.y).square().mean()

    rosa_func.parameters(state)
    value = objective(loss, state["trainable"], TASKS)
    value.backward()
    leaves = state["trainable"].items(include_nested=True, leaves_only=True)
    return value, {str(path): leaf.grad for path, leaf in leaves}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the largest difference relative to the largest of all gradients."""
    assert one.keys() == other.keys()
    largest = max(g.abs().max() for g in other.values())
    return float(max((one[n] - other[n]).abs().max() for n in one) / largest)


def test_the_gradient_of_maml_goes_through_the_steps():
    value, gradients = found(after)
    expected, reference_gradients = reference(through=True)
    assert abs(value - expected) <= TOLERANCE * expected
    assert largest_difference(gradients, reference_gradients) <= TOLERANCE


def test_first_order_has_the_same_loss_and_takes_the_steps_for_constants():
    value, gradients = found(first_order)
    expected, reference_gradients = reference(through=False)
    assert abs(value - expected) <= TOLERANCE * expected
    assert largest_difference(gradients, reference_gradients) <= TOLERANCE
    assert largest_difference(gradients, reference(through=True)[1]) > 1e-2
