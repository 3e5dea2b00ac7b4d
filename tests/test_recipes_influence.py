"""What the recipe of curvature and influence states, against dense weights and closed forms."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor
from torch.func import functional_call, grad, vmap

import rosa_func
from examples.recipes.curvature import conjugate_gradients, fisher_matrix, flat, hessian_product
from models import randn, two_layers
from references import dense_weights, perturbed

# Float64 sums of fewer than 1,000 products in a handful of layers, taken in two ways.
TOLERANCE = 1e-16 * 1000 * 10
deprecated_jit = pytest.mark.filterwarnings("ignore:.torch.jit")  # torch about its own jvp
X, LABELS = randn(5, 6, dtype=torch.float64), torch.tensor([0, 3, 7, 1, 3])


def problem() -> tuple[torch.nn.Module, TensorDict]:
    model = two_layers().double()
    return model, perturbed(rosa_func.init(model, 2))


def unflat(vector: Tensor, like: TensorDict) -> TensorDict:
    """Put values back where `flat` took them from."""
    leaves = dict(like.items(include_nested=True, leaves_only=True))
    pieces = vector.split([leaf.numel() for leaf in leaves.values()])
    return like.apply(lambda x: x).update(
        TensorDict({k: p.view(leaves[k].shape) for k, p in zip(leaves, pieces, strict=True)})
    )


@deprecated_jit
def test_products_with_the_hessian_are_those_of_the_whole_matrix_of_the_dense_model():
    model, state = problem()
    t = state["trainable"]

    def loss(t: TensorDict) -> Tensor:
        return F.cross_entropy(rosa_func.call(model, state.replace(trainable=t), X), LABELS)

    def dense_loss(vector: Tensor) -> Tensor:
        weights = dense_weights(state.replace(trainable=unflat(vector, t)))
        return F.cross_entropy(functional_call(model, weights, (X,)), LABELS)

    H = torch.autograd.functional.hessian(dense_loss, flat(t))
    v = randn(len(H), seed=1, dtype=torch.float64)
    found = flat(hessian_product(loss, t, unflat(v, t)))
    assert (found - H @ v).abs().max() <= TOLERANCE * (H.abs() @ v.abs()).max()


def test_the_fisher_matrix_is_the_mean_over_rows_and_outcomes_of_the_dense_model():
    model, state = problem()
    t = state["trainable"]

    def logits(t: TensorDict, x: Tensor) -> Tensor:
        return rosa_func.call(model, state.replace(trainable=t), x)

    expected = torch.zeros(flat(t).numel(), flat(t).numel(), dtype=torch.float64)
    for x in X:
        vector = flat(t).requires_grad_()
        weights = dense_weights(state.replace(trainable=unflat(vector, t)))
        log_p = functional_call(model, weights, (x,)).log_softmax(-1)
        for outcome in range(8):
            (g,) = torch.autograd.grad(log_p[outcome], vector, retain_graph=True)
            expected += log_p[outcome].exp().detach() * torch.outer(g, g) / len(X)
    found = fisher_matrix(logits, t, X)
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_conjugate_gradients_solve_to_their_tolerance():
    """The rest is at most tolerance |g|, so the error is at most that over the least eigenvalue."""
    M = randn(12, 12, dtype=torch.float64)
    H = M @ M.T + torch.eye(12)
    g = TensorDict({"w": randn(12, seed=1, dtype=torch.float64)})
    x = conjugate_gradients(lambda v: TensorDict({"w": H @ v["w"]}), g, tolerance=1e-8)
    error = x["w"] - torch.linalg.solve(H, g["w"])
    assert error.norm() <= 1.01e-8 * g["w"].norm() / torch.linalg.eigvalsh(H)[0]


def test_conjugate_gradients_say_that_the_curvature_is_not_positive():
    g = TensorDict({"w": torch.ones(2)})
    with pytest.raises(ValueError, match="the curvature is not positive here"):
        conjugate_gradients(lambda v: v * -1, g)


@deprecated_jit
def test_influence_is_exact_up_to_the_leverage_where_the_loss_is_quadratic():
    """With B frozen a linear layer is linear in A: leave-one-out is influence / (1 - h_i)."""
    n, damping = 9, 0.1
    model = torch.nn.Linear(6, 4, bias=False).double()
    state = rosa_func.init(model, 2)
    x, y = (randn(n, k, seed=k, dtype=torch.float64) for k in (6, 4))
    A0, B = state["trainable", "weight"].values()
    x_test = randn(6, seed=9, dtype=torch.float64)

    def predict(t: TensorDict, x: Tensor) -> Tensor:
        factors = TensorDict({"weight": {"A": t["A"], "B": B}})
        return rosa_func.call(model, state.replace(trainable=factors), x)

    def loss(t: TensorDict, x: Tensor, y: Tensor) -> Tensor:
        return (predict(t, x) - y)[..., 0].square().sum() / 2  # the first output alone

    def objective(t: TensorDict) -> Tensor:
        return loss(t, x, y) / n + damping / 2 * (t["A"] - A0).square().sum()

    def closed_form(rows: Tensor) -> Tensor:
        """Return the first row of A by the normal equations: features x B^T, start A0."""
        features, target = (x @ B.T)[rows], (y - x @ state["frozen", "weight"].T)[rows, 0]
        H = features.T @ features / n + damping * torch.eye(2, dtype=torch.float64)
        return torch.linalg.solve(H, features.T @ target / n + damping * A0[0])

    everyone = torch.arange(n)
    A = A0.clone()
    A[0] = closed_form(everyone)
    t = TensorDict({"A": A})
    product = partial(hessian_product, objective, t)
    g_test = grad(lambda t: predict(t, x_test)[0])(t)
    solved = flat(conjugate_gradients(product, g_test, tolerance=1e-14))
    rows = flat(vmap(grad(loss), in_dims=(None, 0, 0))(t, x, y), batched=1)
    H = (x @ B.T).T @ (x @ B.T) / n + damping * torch.eye(2, dtype=torch.float64)
    for i in range(n):
        feature = B @ x[i]
        leverage = feature @ torch.linalg.solve(H, feature) / n
        changed = (closed_form(everyone[everyone != i]) - A[0]) @ (B @ x_test)
        assert rows[i] @ solved / n / (1 - leverage) == pytest.approx(changed.item(), rel=1e-9)
