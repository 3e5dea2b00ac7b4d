"""The composed weight: gradients of every module type, metadata, algebra, and what call refuses."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import rosa_func
from cases import ANY_PARTS, ANY_SAMPLER, DTYPES, WEIGHT_USES, Parts, WeightUse
from models import randn, seeded, tiny_gpt2, token_ids
from references import dense_weights, model_snapshot, perturbed, relative_distance
from rosa_func.weight import Composed, Weight
from rosa_func.weight.composed import composed
from rosa_func.weight.dense import Dense
from rosa_func.weight.low_rank import LowRank

pytestmark = pytest.mark.usefixtures("toys")


def adapted_and_trained(
    use: WeightUse, dtype: torch.dtype, r: int = 2, parts: Parts | None = None, **options: Any
) -> tuple[nn.Module, TensorDict, Tensor]:
    """Return the module, a state of it as if trained, and the input."""
    module, x = seeded(use.build).to(dtype), use.input
    state = rosa_func.init(module, r, targets=use.targets, **options)
    state = parts.put_into(state) if parts else state
    return module, perturbed(state), x.to(dtype) if x.is_floating_point() else x


def gradients_of_dense_weights(
    module: nn.Module, state: TensorDict, x: Tensor
) -> dict[str, Tensor]:
    """Return dW of the dense module for each adapted weight, for the loss that these tests use."""
    weights = {name: weight.detach() for name, weight in dense_weights(state).items()}
    adapted = {name: weights[name].requires_grad_() for name in state["input_dim"].keys()}
    loss = functional_call(module, weights, (x,)).square().sum()
    return dict(zip(adapted, torch.autograd.grad(loss, list(adapted.values())), strict=True))


@pytest.mark.filterwarnings("ignore:.*forms a batch")
@pytest.mark.parametrize("use", WEIGHT_USES, ids=str)
@given(
    key=st.integers(0, 2**64),
    r=st.integers(1, 3),
    sampler=ANY_SAMPLER,
    parts=ANY_PARTS,
    precision=st.sampled_from([(torch.float32, 1e-5), (torch.float64, 1e-12)]),
)
def test_gradients_of_what_trains_are_those_of_the_dense_weight(
    use, key, r, sampler, parts, precision
):
    dtype, relative = precision
    module, state, x = adapted_and_trained(use, dtype, r, parts, sampler=sampler, key=key)
    leaves = rosa_func.parameters(state)
    result = rosa_func.call(module, state, x)
    expected = functional_call(module, dense_weights(state), (x,))
    assert relative_distance(result, expected) <= relative
    result.square().sum().backward()
    gradients = torch.autograd.grad(expected.square().sum(), leaves)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert (leaf.grad - gradient).norm() <= relative * gradient.norm()


@pytest.mark.filterwarnings("ignore:.*forms a batch")
@pytest.mark.parametrize("use", WEIGHT_USES, ids=str)
def test_gradients_of_the_factors_follow_from_that_of_the_dense_weight(use):
    """The same by a formula: d(A) = d(W) B^T and d(B) = A^T d(W)."""
    module, state, x = adapted_and_trained(use, torch.float64)
    leaves = rosa_func.named_parameters(state)
    rosa_func.call(module, state, x).square().sum().backward()
    for name, dW in gradients_of_dense_weights(module, state, x).items():
        A, B = leaves[f"{name}.A"], leaves[f"{name}.B"]
        dW = dW.flatten(A.ndim - 1)
        for found, expected in ((A.grad, dW @ B.mT), (B.grad, A.mT @ dW)):
            assert (found - expected).norm() <= 1e-12 * expected.norm(), name


@pytest.mark.filterwarnings("ignore:.*forms a batch")
@pytest.mark.parametrize("use", [u for u in WEIGHT_USES if u.gradient_is_derivative], ids=str)
def test_gradcheck_of_factors_and_inputs(use):
    module, state, x = adapted_and_trained(use, torch.float64)
    paths = list(state["trainable"].keys(include_nested=True, leaves_only=True))

    def function(x: Tensor, *leaves: Tensor) -> Tensor:
        new = state.clone()
        for path, leaf in zip(paths, leaves, strict=True):
            new["trainable"].set(path, leaf)
        return rosa_func.call(module, new, x)

    leaves = [state["trainable", path].clone().requires_grad_() for path in paths]
    x = x.requires_grad_() if x.is_floating_point() else x
    assert torch.autograd.gradcheck(function, (x, *leaves))


@pytest.mark.parametrize("padding_idx", [0, 3, -2])
def test_padding_rows_of_an_embedding_give_no_gradient(padding_idx):
    module = seeded(lambda: nn.Embedding(9, 6, padding_idx=padding_idx))
    state = perturbed(rosa_func.init(module, 2, targets="weight"))
    A, B = rosa_func.parameters(state)
    padded = torch.full((4,), padding_idx % 9)
    rosa_func.call(module, state, padded).sum().backward()
    assert not A.grad.any() and not B.grad.any()
    rosa_func.call(module, state, torch.cat([padded, torch.tensor([5])])).sum().backward()
    assert A.grad[5].any() and B.grad.any() and int(A.grad.any(dim=1).sum()) == 1


def test_call_under_autocast_computes_in_its_dtype():
    module = seeded(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)))
    state, x = rosa_func.init(module, 2), randn(3, 6)
    leaves = rosa_func.parameters(state)
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = rosa_func.call(module, state, x), module(x)
    assert result.dtype == expected.dtype == torch.bfloat16
    assert relative_distance(result, expected) <= 10 * torch.finfo(torch.bfloat16).eps
    result.float().sum().backward()
    assert {leaf.grad.dtype for leaf in leaves} == {torch.float32}


# The composed weight as a tensor.

shapes = st.tuples(st.integers(1, 6), st.integers(1, 6))


def weight(R: Tensor, A: Tensor, B: Tensor) -> Weight:
    return Weight(Dense(R), (LowRank(A, B),), torch.tensor(1))


def composed_and_dense(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64):
    """Return a composed weight and the dense one it stands for."""
    R, A, B = (
        randn(*s, seed=seed + i, dtype=dtype) for i, s in enumerate([(m, n), (m, 2), (2, n)])
    )
    return composed(weight(R, A, B)), R + A @ B


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_composed_weight_has_the_metadata_of_the_weight(dtype):
    model = seeded(tiny_gpt2).to(dtype)
    state = rosa_func.init(model, 2)
    weights, parameters = rosa_func.compose(state), dict(model.named_parameters())
    assert weights.keys() == parameters.keys()
    for name, p in parameters.items():
        w = weights[name]
        assert isinstance(w, Tensor)
        assert isinstance(w, Composed) == (name in state["input_dim"].keys())
        for attribute in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta"):
            assert getattr(w, attribute) == getattr(p, attribute)
        assert (w.size(), w.size(0), w.dim(), w.numel()) == (p.size(), len(p), p.dim(), p.numel())
        assert len(w) == len(p) and w.is_floating_point() and not w.is_complex()
    assert all(not w.requires_grad for w in weights.values())
    rosa_func.parameters(state)
    for name, w in rosa_func.compose(state).items():
        assert w.requires_grad == (name in state["input_dim"].keys())


TRANSPOSES = {
    ".T": lambda w: w.T,
    ".mT": lambda w: w.mT,
    ".t()": lambda w: w.t(),
    "torch.t": torch.t,
    "transpose": lambda w: w.transpose(0, 1),
    "transpose back": lambda w: w.transpose(-1, 0),
    "torch.transpose": lambda w: torch.transpose(w, 1, 0),
    "transpose of names": lambda w: w.transpose(dim0=0, dim1=1),
}


@pytest.mark.parametrize("transpose", TRANSPOSES.values(), ids=TRANSPOSES)
@given(shape=shapes, seed=st.integers(0, 100))
def test_a_transposed_composed_weight_is_composed(transpose, shape, seed):
    w, W = composed_and_dense(*shape, seed)
    assert isinstance(transpose(w), Composed) and transpose(w).shape == W.T.shape
    assert torch.allclose(transpose(w) * 1, W.T)
    assert torch.allclose(transpose(transpose(w)) * 1, W)
    assert torch.allclose(w.transpose(0, 0), W)


# {name: function of the weight (m x n), a matrix with n columns (X), one with m columns (Y)}
PRODUCTS = {
    "F.linear": lambda w, X, Y: F.linear(X, w),
    "F.linear by name": lambda w, X, Y: F.linear(input=X, weight=w, bias=w[:, 0]),
    "x @ W.T": lambda w, X, Y: X @ w.T,
    "y @ W": lambda w, X, Y: Y @ w,
    "W @ x": lambda w, X, Y: w @ X.T,
    "W @ v": lambda w, X, Y: w @ X[0],
    "v @ W": lambda w, X, Y: Y[0] @ w,
    "W @ batch": lambda w, X, Y: w @ X.T.expand(2, -1, -1),
    "batch @ W": lambda w, X, Y: Y.expand(2, -1, -1) @ w,
    "W @ W.T": lambda w, X, Y: w @ w.T,
    "mm": lambda w, X, Y: torch.mm(Y, w),
    "mm by name": lambda w, X, Y: torch.mm(Y, mat2=w),
    "matmul": lambda w, X, Y: Y.matmul(w),
    "addmm": lambda w, X, Y: torch.addmm(X[0], Y, w),
    "addmm by name": lambda w, X, Y: torch.addmm(X[0], mat1=Y, mat2=w),
    "addmm scaled": lambda w, X, Y: torch.addmm(X[0], Y, w, beta=2, alpha=3),
    "addmm to W": lambda w, X, Y: torch.addmm(w, Y.T, X),
    "einsum": lambda w, X, Y: torch.einsum("bm,mn->bn", Y, w),
    "sum": lambda w, X, Y: w.sum(0),
    "cat": lambda w, X, Y: torch.cat([w, X, w]),
    "index": lambda w, X, Y: w[1:, 0],
    "to": lambda w, X, Y: w.to(torch.float32).double(),
    "no rows": lambda w, X, Y: Y[:0] @ w,
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
@given(shape=shapes, seed=st.integers(0, 100))
def test_operations_on_a_composed_weight_equal_those_on_the_dense_weight(product, shape, seed):
    w, W = composed_and_dense(*shape, seed)
    X, Y = (randn(3, n, seed=seed, dtype=torch.float64) for n in (shape[1], shape[0]))
    result, expected = product(w, X, Y), product(W, X, Y)
    assert type(result) is Tensor and result.shape == expected.shape
    assert torch.allclose(result, expected, rtol=1e-6 if product is PRODUCTS["to"] else 1e-12)


@settings(max_examples=20)
@given(shape=st.lists(st.integers(1, 4), min_size=3, max_size=4), seed=st.integers(0, 100))
def test_composed_weights_of_more_than_two_dimensions_multiply_as_stacks_of_matrices(shape, seed):
    R = randn(*shape, seed=seed)
    A, B = randn(shape[0], 1, seed=seed + 1), randn(1, R[0].numel(), seed=seed + 2)
    w, W = composed(weight(R, A, B)), R + (A @ B).view(R.shape)
    left, right = randn(2, shape[-2], seed=seed), randn(shape[-1], 2, seed=seed)
    assert torch.allclose(left @ w, left @ W, atol=1e-5)
    assert torch.allclose(w @ right, W @ right, atol=1e-5)
    assert torch.allclose(w.mT * 1, W.mT)


# call.


BIAS = "transformer.ln_f.bias"


@pytest.mark.parametrize(
    "change, error, match",
    [
        (lambda f: f.del_(BIAS), KeyError, r"lacks transformer\.ln_f\.bias of GPT2LMHeadModel"),
        (lambda f: f.set("x.y", torch.zeros(1)), KeyError, r"x\.y.*GPT2LMHeadModel"),
        (lambda f: f.set(BIAS, torch.zeros(13)), ValueError, r"ln_f\.bias .*\(13,\).*\(12,\)"),
    ],
    ids=["removed", "added", "reshaped"],
)
def test_call_refuses_a_state_that_does_not_fit(change, error, match):
    model = seeded(tiny_gpt2)
    state = rosa_func.init(model, 2)
    change(state["frozen"])
    before = model_snapshot(model)
    with pytest.raises(error, match=match):
        rosa_func.call(model, state, token_ids(1, 4))
    assert model_snapshot(model) == before


def test_call_names_both_shapes_of_another_model():
    state = rosa_func.init(seeded(tiny_gpt2), 2)
    wider = seeded(lambda: tiny_gpt2(heads=4))
    with pytest.raises(ValueError, match=r"wte\.weight .*\(31, 12\).*\(31, 16\)"):
        rosa_func.call(wider, state, token_ids(1, 4))
    with pytest.raises(KeyError, match=r"transformer\.h\.1\..*GPT2LMHeadModel"):
        rosa_func.call(seeded(lambda: tiny_gpt2(layers=1)), state, token_ids(1, 4))


@pytest.mark.parametrize("train", [(), "1"])
def test_batch_norm_in_training_does_not_write_into_the_model_or_the_state(train):
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    state, x = rosa_func.init(model, 2, train=train), randn(5, 6)
    before, buffers = model_snapshot(model), {n: b.clone() for n, b in model.named_buffers()}
    result = rosa_func.call(model, state, x)
    assert model_snapshot(model) == before
    assert all(torch.equal(state["frozen", n], b) for n, b in buffers.items())
    assert relative_distance(result, model(x)) <= 1e-5  # both use the statistics of the batch
    assert model_snapshot(model) != before  # the model's own forward pass does write


class LayerWithTwoNames(nn.Module):
    """One layer under two names; if tied, another layer has the same weight."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again, self.other = self.first, nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        if tied:
            self.other.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 0:
            raise RuntimeError("no rows")
        return self.other(torch.tanh(self.again(torch.tanh(self.norm(self.first(x))))))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_module_under_two_names_has_one_weight_and_keeps_it(tied, training):
    model, x = seeded(lambda: LayerWithTwoNames(tied)).train(training), randn(3, 6)
    state = perturbed(rosa_func.init(model, 2))
    names = ["first.weight"] if tied else ["first.weight", "other.weight"]
    assert list(state["trainable"].keys()) == names
    before = model_snapshot(model)
    result = rosa_func.call(model, state, x)
    assert model_snapshot(model) == before
    rosa_func.parameters(state)
    rosa_func.call(model, state, x).sum().backward()
    with rosa_func.bind(model, state) as bound:
        assert torch.equal(bound(x), result)
    with pytest.raises(RuntimeError, match="no rows"):
        rosa_func.call(model, state, x[:0])
    assert model_snapshot(model) == before
    other = seeded(lambda: LayerWithTwoNames(tied)).train(training)
    other.load_state_dict(rosa_func.merge(state), strict=False)
    assert relative_distance(result, other(x)) <= 1e-5
    skeleton = rosa_func.skeleton(model)
    assert torch.equal(rosa_func.call(skeleton, state, x), result)
    assert all(p.is_meta for p in skeleton.parameters())


def test_call_takes_a_buffer_that_two_modules_share():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)).train()
    model[2].running_mean = model[1].running_mean
    state, x = rosa_func.init(model, 2), randn(5, 6)
    before = model_snapshot(model)
    result = rosa_func.call(model, state, x)
    assert model_snapshot(model) == before
    assert relative_distance(result, model(x)) <= 1e-5


# Code that does not go through __torch_function__.


class ProductWithItsOwnBackward(torch.autograd.Function):
    """A product with a backward pass of its own."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x @ w.t()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return d @ w, d.t() @ x


def reentrant_product(x: Tensor, w: Tensor) -> Tensor:
    return checkpoint(F.linear, x, w, use_reentrant=True)


class MultipliesBy(nn.Linear):
    """A linear layer that multiplies in a way of its own."""

    def __init__(self, product) -> None:
        super().__init__(6, 5)
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight) + self.bias


@pytest.mark.parametrize(
    "product", [ProductWithItsOwnBackward.apply, reentrant_product], ids=["own", "reentrant"]
)
def test_code_with_a_backward_pass_of_its_own_gives_the_factors_their_gradients(product):
    model, x = seeded(lambda: MultipliesBy(product)), randn(4, 6).requires_grad_()
    state = perturbed(rosa_func.init(model, 2))
    leaves = rosa_func.named_parameters(state)
    rosa_func.call(model, state, x).square().sum().backward()
    dW = gradients_of_dense_weights(nn.Linear(6, 5), state, x.detach())["weight"]
    A, B = leaves["weight.A"], leaves["weight.B"]
    assert (
        relative_distance(A.grad, dW @ B.T) <= 1e-5 and relative_distance(B.grad, A.T @ dW) <= 1e-5
    )


def test_code_with_a_backward_pass_of_its_own_works_under_autocast():
    model, x = seeded(lambda: MultipliesBy(ProductWithItsOwnBackward.apply)), randn(4, 6)
    state = perturbed(rosa_func.init(model, 2))
    leaves = rosa_func.named_parameters(state)
    with torch.autocast("cpu", torch.bfloat16):
        rosa_func.call(model, state, x).square().sum().backward()
    dW = gradients_of_dense_weights(nn.Linear(6, 5), state, x)["weight"]
    A, B = leaves["weight.A"], leaves["weight.B"]
    assert (
        relative_distance(A.grad, dW @ B.T) <= 3e-2 and relative_distance(B.grad, A.T @ dW) <= 3e-2
    )


def test_code_with_a_backward_pass_of_its_own_works_under_grad():
    model, x = seeded(lambda: MultipliesBy(ProductWithItsOwnBackward.apply)), randn(4, 6)
    state = perturbed(rosa_func.init(model, 2))

    def loss(trainable):
        full = state.replace(trainable=trainable)
        return rosa_func.call(model, full, x).square().sum()

    found = torch.func.grad(loss)(state["trainable"])["weight"]
    dW = gradients_of_dense_weights(nn.Linear(6, 5), state, x)["weight"]
    factors = state["trainable", "weight"]
    assert relative_distance(found["A"], dW @ factors["B"].T) <= 1e-5
    assert relative_distance(found["B"], factors["A"].T @ dW) <= 1e-5


def test_code_that_bypasses_torch_function_sees_nan_instead_of_the_frozen_weight():
    state = rosa_func.init(nn.Linear(6, 5), 2)
    weight = rosa_func.compose(state)["weight"]
    assert torch.func.vmap(lambda row: row.sum())(weight).isnan().all()


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.clamp_(-1, 1),
        lambda w: w.copy_(torch.zeros(5, 6)),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: nn.init.zeros_(w),
        lambda w: setattr(w, "data", torch.zeros(5, 6)),
    ],
    ids=["clamp_", "copy_", "item", "init", "data"],
)
def test_a_composed_weight_cannot_be_written_to(write):
    weight = rosa_func.compose(rosa_func.init(nn.Linear(6, 5), 2))["weight"]
    with pytest.raises(TypeError, match=r"would write to a weight of shape \(5, 6\)"):
        write(weight)
