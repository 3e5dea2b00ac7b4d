"""The recipe of uncertainty: Fisher information, Laplace and calibration, against references."""

import pytest
import torch
from torch import Tensor

import rosa_func
from examples.recipes import laplace, snapshots
from examples.recipes.calibration import calibration
from references import dense_weights, perturbed, relative_distance
from rosa_func import stacking

WIDTH, ROWS = 8, 6


@pytest.fixture(scope="module")
def model():
    return snapshots.network(WIDTH, seed=0)


@pytest.fixture(scope="module")
def x(model) -> Tensor:
    return snapshots.rows(model, ROWS, seed=1).x


@pytest.fixture(scope="module")
def jacobians(model, x: Tensor) -> tuple:
    """Return a state, the logits of rows, and their derivatives, one by one by dense weights."""
    state = perturbed(rosa_func.init(model, 2))
    leaves = list(rosa_func.named_parameters(state).values())
    logits = torch.func.functional_call(model, dense_weights(state), (x,))
    J = [
        torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(c, leaves, retain_graph=True)])
                for c in row
            ]
        )
        for row in logits
    ]
    return state.detach(), logits.detach(), torch.stack(J)


def test_the_fisher_information_is_the_mean_square_of_the_score(model, x, jacobians):
    """Summed over rows; the mean is over labels as the model draws them."""
    state, logits, J = jacobians
    p = logits.softmax(-1)
    expected = torch.zeros(J.shape[-1])
    for row in range(ROWS):
        for label in range(snapshots.CLASSES):
            score = J[row, label] - p[row] @ J[row]  # the derivative of log p(label)
            expected += p[row, label] * score.square()
    assert relative_distance(laplace.fisher_diagonal(model, state, x), expected) <= 1e-5


@pytest.mark.parametrize("prior", [0.1, 10.0])
def test_laplace_softens_by_the_variance_of_the_logits(model, x, jacobians, prior: float):
    state, logits, J = jacobians
    F_ = laplace.fisher_diagonal(model, state, x)
    variance = torch.einsum("rcp,p->rc", J.square(), 1 / (F_ + prior))
    expected = (logits / (1 + torch.pi * variance / 8).sqrt()).softmax(-1)
    assert relative_distance(laplace.softened(model, state, F_, prior, x), expected) <= 1e-5


def test_with_a_narrow_prior_laplace_is_the_model(model, x, jacobians):
    state, logits, _ = jacobians
    F_ = laplace.fisher_diagonal(model, state, x)
    found = laplace.softened(model, state, F_, 1e12, x)
    assert relative_distance(found, logits.softmax(-1)) <= 1e-5


def test_predictions_of_all_snapshots_at_once_are_those_of_each(model, x):
    data = snapshots.rows(model, 20, seed=2)
    kept = snapshots.snapshots(model, data, cycles=3, steps=3)
    at_once = stacking.vmap(lambda s, x: rosa_func.call(model, s, x), (0, None))
    found = at_once(stacking.stack(kept), x)
    for state, logits in zip(kept, found, strict=True):
        expected = torch.func.functional_call(model, dense_weights(state), (x,))
        assert relative_distance(logits, expected) <= 1e-5
    assert all(relative_distance(found[i], found[i + 1]) > 1e-3 for i in range(2))


def test_calibration_by_hand():
    """Two predictions are 0.95 sure and one is right; two are 0.65 sure and both are right."""
    p = torch.tensor([[0.95, 0.05], [0.05, 0.95], [0.65, 0.35], [0.35, 0.65]])
    found = calibration(p, torch.tensor([0, 0, 0, 1]))
    assert found.share[[6, 9]].tolist() == [0.5, 0.5] and found.share.sum() == 1
    assert found.right[[6, 9]].tolist() == [1.0, 0.5]
    assert found.sure[[6, 9]].tolist() == pytest.approx([0.65, 0.95])
    assert found.error() == pytest.approx(0.5 * 0.35 + 0.5 * 0.45)


def test_calibration_of_predictions_that_are_quite_sure():
    p = torch.tensor([[1.0, 0.0]])
    assert calibration(p, torch.tensor([0])).error() == 0
