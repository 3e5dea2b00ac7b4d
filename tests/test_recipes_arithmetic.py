"""What the recipe of arithmetic states: sums of changes, and what averages of factors are."""

import torch

import rosa_func
from examples.recipes.arithmetic import mean_of_factors, moved, side_by_side
from models import two_layers
from references import dense_weights, perturbed
from rosa_func import checkpoint

EPS = 2.0**-52


def test_a_mean_of_factors_is_off_by_a_quarter_of_the_product_of_their_differences():
    model = two_layers().double()
    start = rosa_func.init(model, 2)
    one, other = (perturbed(start, seed=seed) for seed in (1, 2))
    mean = mean_of_factors((0.5, one), (0.5, other))
    weights, mixed = (dense_weights(s) for s in (one, other)), rosa_func.merge(mean)
    first, second = weights
    for name, factors in one["trainable"].items():
        A, B = (factors[side] - other["trainable", name][side] for side in "AB")
        expected = (first[name] + second[name]) / 2 - A @ B / 4
        size = first[name].abs().max() + (A.abs() @ B.abs()).max()
        assert (mixed[name] - expected).abs().max() <= 20 * EPS * size  # sums of about 10 terms
        assert (A @ B / 4).abs().max() > 1e-3


def test_factors_side_by_side_are_the_sum_of_the_changes_of_different_draws():
    """Within the tolerance of each delta, times its coefficient, and rounding."""
    model = two_layers().double()
    states = [perturbed(rosa_func.init(model, 2, key=key), seed=key) for key in range(3)]
    c = (0.5, -1.0, 2.0)
    deltas = [checkpoint.delta(state, model) for state in states]
    found = checkpoint.apply_delta(model, side_by_side(*zip(c, deltas, strict=True)))
    dense = [dense_weights(state) for state in states]
    W0 = dict(model.named_parameters())
    as_weights = moved(W0, *zip(c, map(rosa_func.merge, states), strict=True))
    for name in states[0]["input_dim"].keys():
        changes = [weights[name] - W0[name] for weights in dense]
        expected = W0[name] + 0.5 * changes[0] - changes[1] + 2 * changes[2]
        size = sum(abs(k) * W[name].norm() for k, W in zip(c, dense, strict=True)) + W0[name].norm()
        assert (as_weights[name] - expected).norm() <= 100 * EPS * size
        assert (found[name] - expected).norm() <= 1e-7 * size
        assert (found[name] - W0[name]).norm() > 1e-2
    for name in W0.keys() - set(states[0]["input_dim"].keys()):
        assert torch.equal(found[name], W0[name])
