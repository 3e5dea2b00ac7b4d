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
from references import (
    dense_weights,
    model_snapshot,
    perturbed,
    relative_distance,
    state_bytes,
)
from rosa_func import _torch
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
    assert not isinstance(result, Composed) and result.shape == expected.shape
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


class RunsItself(Tensor):
    """An input that runs every function itself and asks no other class."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def jagged(x: Tensor, layout: torch.layout = torch.jagged) -> Tensor:
    return torch.nested.as_nested_tensor([x[:3], x[3:]], layout=layout)


# {name: (the input, its values)}
UNUSUAL_INPUTS = {
    "coo": lambda x: x.to_sparse(),
    "a row of coo": lambda x: x[0].to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "csc": lambda x: x.to_sparse_csc(),
    "jagged": jagged,
    "nested": lambda x: jagged(x, torch.strided),
    "a class that runs the function": lambda x: x.as_subclass(RunsItself),
}


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.filterwarnings("ignore:.*CUDA graphs")
class TestUnusualInputs:
    """Jagged inputs and classes that run the function gave NaN; a sparse row, nested: errors."""

    @pytest.mark.parametrize("made", UNUSUAL_INPUTS.values(), ids=UNUSUAL_INPUTS)
    @pytest.mark.parametrize("bias", [True, False])
    def test_a_linear_layer_computes_and_trains_with_them(self, made, bias):
        layer = seeded(lambda: nn.Linear(6, 5, bias=bias))
        state, x = perturbed(rosa_func.init(layer, 2)), randn(5, 6)
        weights = {name: w.detach() for name, w in dense_weights(state).items()}
        weights["weight"].requires_grad_()
        expected = plain(functional_call(layer, weights, (made(x),)))
        expected.square().sum().backward()
        with torch.no_grad():
            assert relative_distance(plain(rosa_func.call(layer, state, made(x))), expected) <= 1e-5
        leaves = rosa_func.named_parameters(state)
        result = plain(rosa_func.call(layer, state, made(x)))
        assert relative_distance(result, expected) <= 1e-5
        result.square().sum().backward()
        A, B, dW = leaves["weight.A"], leaves["weight.B"], weights["weight"].grad
        assert relative_distance(A.grad, dW @ B.T) <= 1e-5
        assert relative_distance(B.grad, A.T @ dW) <= 1e-5

    @pytest.mark.parametrize("made", [jagged, lambda x: x.as_subclass(RunsItself)])
    def test_an_embedding_takes_them(self, made):
        layer, ids = seeded(lambda: nn.Embedding(9, 6)), token_ids(1, 5)[0] % 9
        state = perturbed(rosa_func.init(layer, 2, targets="weight"))
        W = dense_weights(state)["weight"]
        assert relative_distance(plain(rosa_func.call(layer, state, made(ids))), W[ids]) <= 1e-6

    def test_a_derivative_that_would_be_lost_is_refused(self):
        layer, x = seeded(lambda: nn.Linear(6, 5)), randn(4, 6).as_subclass(RunsItself)
        state = rosa_func.init(layer, 2)

        def loss(trainable: TensorDict) -> Tensor:
            return rosa_func.call(layer, state.replace(trainable=trainable), x).sum()

        with pytest.raises(TypeError, match=r"weight of shape .*its derivative would be lost"):
            torch.func.grad(loss)(state["trainable"])
        rosa_func.parameters(state)
        with torch.no_grad():
            weight = rosa_func.compose(state)["weight"]
        with pytest.raises(TypeError, match=r"weight of shape .*its derivative would be lost"):
            F.linear(x, weight)


def plain(result: Tensor) -> Tensor:
    """Return the values of a result of any kind."""
    if result.is_nested:
        return torch.cat([*result.unbind()])
    return result.as_subclass(Tensor)


def test_code_that_asks_no_class_sees_the_whole_weight():
    """It saw NaN."""
    state = perturbed(rosa_func.init(nn.Linear(6, 5), 2))
    weight, W = rosa_func.compose(state)["weight"], dense_weights(state)["weight"]
    assert torch.allclose(torch.func.vmap(lambda row: row.sum())(weight), W.sum(1))
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.allclose(weight * 1, W)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) == (2, 11),
    reason="the compiler of torch 2.11 fails on norm by itself",
)
def test_a_dense_weight_is_formed_inside_one_whole_graph():
    """A slice or a norm of a weight broke the graph: fullgraph=True was an error."""
    torch.compiler.reset()
    model = seeded(lambda: MultipliesBy(lambda x, w: x @ (w / w.norm(dim=1, keepdim=True)).T))
    state, x = perturbed(rosa_func.init(model, 2)), randn(4, 6)
    step = torch.compile(
        lambda state: rosa_func.call(model, state, x), fullgraph=True, backend="aot_eager"
    )
    expected = functional_call(model, dense_weights(state), (x,))
    assert relative_distance(step(state), expected) <= 1e-5


ZEROS = torch.zeros(5, 6)

# What models do to their weights in a forward pass, in the hope that it stays.
WRITES = {
    "clamp_": lambda w: w.clamp_(-1, 1),
    "copy_": lambda w: w.copy_(ZEROS),
    "item": lambda w: w.__setitem__(0, 1.0),
    "init": nn.init.zeros_,
    "data": lambda w: setattr(w, "data", ZEROS),
    "out": lambda w: torch.renorm(w.detach(), 2, 0, 0.1, out=w),
    "by name": lambda w: torch.clamp_(input=w, min=0),
    "inplace": lambda w: F.relu(w, inplace=True),
    "max_norm": lambda w: F.embedding(torch.tensor([0]), w, max_norm=0.1),
    "operator": lambda w: torch.ops.aten.clamp_.default(w, 0),
    "foreach": lambda w: torch._foreach_mul_([w], 2.0),
    "where no class is asked": lambda w: torch.add(ZEROS.as_subclass(RunsItself), 1, out=w),
    "of a transpose": lambda w: w.T.clamp_(0, 1),
    "of data": lambda w: w.data.clamp_(-1, 1),
    "of data, out": lambda w: torch.renorm(w.detach(), 2, 0, 0.1, out=w.data),
    "of data, copy_": lambda w: w.data.copy_(ZEROS),
    "of data, item": lambda w: w.data.__setitem__(0, 1.0),
    "of data, data": lambda w: setattr(w.data, "data", ZEROS),
    "of data of a row": lambda w: w.data[0].fill_(1.0),
    "of detach": lambda w: w.detach().clamp_(-1, 1),
    "of a row": lambda w: w[0].zero_(),
    "of a part": lambda w: w.split(2)[1].zero_(),
    "of a view": lambda w: w.view(-1).clamp_(0, 1),
    "of a view of a view": lambda w: w.unsqueeze(0).flatten().__setitem__(0, 1.0),
    "of itself": lambda w: w.contiguous().zero_(),
}


class Writes(nn.Linear):
    """A layer that writes to its weight in its forward pass."""

    def __init__(self, write) -> None:
        super().__init__(6, 5)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.write(self.weight)
        return super().forward(x)


class TestWrites:
    """`weight.data.clamp_()` and its like changed a copy: 0.75 off, without a word."""

    @pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
    def test_a_write_to_a_composed_weight_is_refused(self, write, mode):
        model, x = seeded(lambda: Writes(write)), randn(3, 6)
        state = rosa_func.init(model, 2)
        rosa_func.parameters(state)
        before, kept = model_snapshot(model), state_bytes(state)
        with mode(), pytest.raises(TypeError, match=r"would write to a .*of shape \(.*targets"):
            rosa_func.call(model, state, x)
        assert model_snapshot(model) == before and state_bytes(state) == kept

    @pytest.mark.parametrize("operator", ["+=", "-=", "*=", "/=", "//=", "%=", "**="])
    def test_an_augmented_assignment_is_refused_too(self, operator):
        """Python takes a TypeError for "try w = w + 1"."""
        weight = rosa_func.compose(rosa_func.init(nn.Linear(6, 5), 2))["weight"]
        for w in (weight, weight.data):
            with pytest.raises(ValueError, match="would write to a"):
                exec(f"w {operator} 2", {"w": w})

    @pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
    def test_a_write_inside_a_transform_is_refused(self, transform):
        model, x = seeded(lambda: Writes(WRITES["of a view"])), randn(3, 6)
        state = rosa_func.init(model, 2)

        def loss(trainable: TensorDict) -> Tensor:
            return rosa_func.call(model, state.replace(trainable=trainable), x).sum()

        given = state["trainable"]
        given = torch.stack([given, given]) if transform is torch.func.vmap else given
        with pytest.raises(TypeError, match="would write to a"):
            transform(loss)(given)

    @pytest.mark.skipif(_torch._HAS_OLD_DYNAMO, reason="it is given dense weights")
    @pytest.mark.filterwarnings("ignore:Dynamo does not know")  # of what comes after the error
    def test_a_compiler_meets_the_error_too(self):
        torch.compiler.reset()
        model, x = seeded(lambda: Writes(WRITES["of data"])), randn(3, 6)
        state = rosa_func.init(model, 2)
        step = torch.compile(lambda: rosa_func.call(model, state, x), backend="aot_eager")
        with pytest.raises(Exception, match=r"would write to a|already tracked for mutation"):
            step()

    def test_numpy_sees_the_values_and_cannot_write(self):
        state = perturbed(rosa_func.init(nn.Linear(6, 5), 2))
        array = rosa_func.compose(state)["weight"].detach().numpy()
        assert torch.allclose(torch.tensor(array), dense_weights(state)["weight"])
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0

    def test_what_a_model_makes_of_its_weight_is_its_own(self):
        state = perturbed(rosa_func.init(nn.Linear(6, 5), 2))
        w, W = rosa_func.compose(state)["weight"], dense_weights(state)["weight"]
        for made in (w.clone(), w.data.clone(), w.data * 1, torch.zeros(5, 6).copy_(w.data)):
            assert type(made) is Tensor and torch.allclose(made, W)
            assert not made.zero_().any()
        assert torch.allclose(F.linear(torch.eye(6), w.data), W.T)
