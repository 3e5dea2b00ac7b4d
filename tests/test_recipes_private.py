"""The recipe of DP-SGD: three ways to the clipped sum, and an accountant, against references."""

import math

import pytest
import torch
from torch import Tensor, nn

import rosa_func
from examples.recipes import accountant, counting, private
from models import randn, seeded
from references import dense_weights, perturbed
from rosa_func import samplers


@pytest.mark.parametrize("C", [0.05, 0.5, math.inf])
@pytest.mark.parametrize("sampler", [samplers.lora, samplers.random])
def test_the_clipped_sum_is_that_of_microbatches(C, sampler):
    model = counting.counter(width=16, layers=1, steps=0)
    state = perturbed(rosa_func.init(model, 3, sampler=sampler))
    ids = counting.sequences(torch.arange(1, 7), 6, 0)
    clipped = []  # by dense weights, and no code of the library
    leaves = rosa_func.named_parameters(state)
    for sample in ids:
        logits = torch.func.functional_call(model, dense_weights(state), (sample[None],)).logits
        loss = counting.loss_of(logits, sample[None])
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        clipped.append([g * min(1.0, C / float(norm)) for g in gradients])
    expected = [torch.stack(each).sum(0) for each in zip(*clipped, strict=True)]
    largest = max(e.abs().max() for e in expected)
    for way in (private.by_microbatches, private.by_vmap, private.by_ghost_norms):
        for g, e in zip(way(model, state, ids, C), expected, strict=True):
            assert (g - e).abs().max() <= 1e-5 * largest, way.__name__
    hooks = [module._forward_hooks for module in model.modules()]
    assert not any(hooks)


@pytest.mark.parametrize("input_dim", [0, 1])
def test_norms_from_the_factors_are_those_of_the_gradients_of_each_sample(input_dim):
    """In a weight of either layout: Conv1D's, in x out, or that of nn.Linear."""
    X, D = randn(4, 7, 6, seed=1), randn(4, 7, 5, seed=2)
    state = rosa_func.init(seeded(lambda: nn.Sequential(nn.Linear(6, 5))), 2)
    A, B = (state["trainable", "0.weight", side] for side in ("A", "B"))
    if input_dim == 0:
        state["trainable", "0.weight"] = {"A": B.mT.contiguous(), "B": A.mT.contiguous()}
        state["input_dim", "0.weight"] = torch.tensor(0)
    squares = torch.ones(4)
    private.add_square_norms(squares, state, "0.weight", X, D)
    A, B = A.requires_grad_(), B.requires_grad_()
    for x, d, found in zip(X, D, squares, strict=True):
        gradients = torch.autograd.grad((x @ (A @ B).mT * d).sum(), (A, B))
        expected = 1 + sum(float(g.square().sum()) for g in gradients)
        assert float(found) == pytest.approx(expected, rel=1e-5)


def divergence(order: int, sigma: float, q: float) -> float:
    """Integrate the Rényi divergence of (1 - q) N(0, s^2) + q N(1, s^2) from N(0, s^2)."""
    z = torch.linspace(-40, 40, 400_001, dtype=torch.float64) * sigma + order / 2
    normal = -z.square() / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi))
    ratio = torch.log1p(q * torch.expm1((2 * z - 1) / (2 * sigma**2)))
    logs = normal + order * ratio
    top = logs.max()
    return float(top + torch.trapezoid((logs - top).exp(), z).log()) / (order - 1)


@pytest.mark.parametrize("order", [2, 3, 8, 32])
@pytest.mark.parametrize(("sigma", "q"), [(0.8, 0.01), (1.0, 0.1), (2.0, 0.5), (2.0, 1.0)])
def test_the_divergence_of_a_step_is_its_integral(order, sigma, q):
    found = accountant.renyi_divergence(order, sigma, q)
    assert found == pytest.approx(divergence(order, sigma, q), rel=1e-6)


@pytest.mark.parametrize(("sigma", "steps"), [(4.0, 1), (4.0, 10), (20.0, 100)])
def test_epsilon_is_a_little_above_the_exact_one_of_the_gaussian_mechanism(sigma, steps):
    """Known in closed form where each sample is in each batch (Balle and Wang 2018, theorem 8)."""

    def delta(epsilon: float) -> float:
        s = sigma / math.sqrt(steps)

        def below(x: float) -> float:
            return float(torch.special.ndtr(torch.tensor(x, dtype=torch.float64)))

        tail = below(-1 / (2 * s) - epsilon * s)
        return below(1 / (2 * s) - epsilon * s) - math.exp(epsilon) * tail

    spent = accountant.epsilon(sigma, 1, steps, 1e-5)
    assert delta(spent) <= 1e-5 < delta(spent / 1.2)


@pytest.mark.parametrize(
    ("sigma", "q", "steps"), [(1.0, 1 / 16, 60), (0.8, 0.01, 1000), (2.0, 0.5, 10), (2.0, 1.0, 5)]
)
def test_epsilon_is_that_of_opacus_by_the_same_orders(sigma, q, steps):
    """With its own orders, some of them fractions, its epsilon is up to 3% smaller."""
    opacus = pytest.importorskip("opacus.accountants").RDPAccountant()
    opacus.history = [(sigma, q, steps)]
    found = accountant.epsilon(sigma, q, steps, 1e-4)
    same_orders = opacus.get_epsilon(1e-4, alphas=list(accountant.ORDERS))
    assert found == pytest.approx(same_orders, rel=1e-9)
    assert 0.97 * found <= opacus.get_epsilon(1e-4) <= found * (1 + 1e-9)


def test_training_takes_the_noise_from_the_epsilon():
    """With neither noise nor clipping it learns; with the noise the factors are others."""
    model = counting.counter(width=16, layers=1, steps=0)
    data = counting.sequences(1, 64, 0)
    plain, noisy = (private.train(model, data, s, q=0.5, steps=3) for s in (0.0, 1.0))

    def loss(state) -> Tensor:
        with torch.no_grad():
            return counting.loss(model, state, data)

    assert loss(plain) < loss(rosa_func.init(model, 4, sampler=samplers.lora))
    name = "transformer.h.0.attn.c_attn.weight"
    assert not torch.equal(plain["trainable", name, "B"], noisy["trainable", name, "B"])
