"""What the recipe of budgets states: ranks of the largest gain that a budget pays for."""

from itertools import product

import pytest
import torch

import rosa_func
from examples.recipes.allocation import dealt, spectra
from models import randn, two_layers


@pytest.mark.parametrize("seed", range(3))
def test_ranks_of_equal_cost_have_the_largest_gain_of_all_allocations(seed: int):
    gains = spectra({name: randn(4, 4, seed=10 * seed + i) for i, name in enumerate("abc")})
    ranks = dealt(gains, dict.fromkeys("abc", 8), budget=5 * 8 + 7)

    def gain(ranks: tuple[int, ...]) -> float:
        return sum(float(g[:r].sum()) for g, r in zip(gains.values(), ranks, strict=True))

    payable = [each for each in product(range(5), repeat=3) if sum(each) <= 5]
    assert gain(tuple(ranks.values())) == max(map(gain, payable))


def test_a_mapping_is_taken_by_init_and_leaves_no_rank_that_could_be_paid():
    model = two_layers()
    gains = spectra({name: W.detach() for name, W in model.named_parameters()})
    costs = {"0.weight": 10, "2.weight": 12}
    for budget in range(10, 90):
        ranks = dealt(gains, costs, budget)
        values = rosa_func.count(rosa_func.init(model, ranks)).trainable
        assert values == sum(ranks[name] * costs[name] for name in ranks) <= budget
        payable = [name for name in costs if ranks[name] < 4 and costs[name] <= budget - values]
        assert not payable


def test_a_spectrum_is_what_each_rank_of_the_best_approximation_adds():
    """Eckart and Young: the squared error of rank k is the sum of what is left of the spectrum."""
    W = randn(6, 4, dtype=torch.float64)
    (gain,) = spectra({"0.weight": W}).values()
    U, s, V = torch.linalg.svd(W, full_matrices=False)
    for k in range(5):
        error = (W - U[:, :k] * s[:k] @ V[:k]).square().sum()
        assert abs(error - gain[k:].sum()) <= 100 * 2.0**-52 * W.square().sum()
