"""Gradients through W = R + A B + S: those of a dense weight behind a mask, and no such weight."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, vmap

import rosa_func
from cases import (
    CONV1D,
    CONV2D,
    EMBEDDING,
    LAYOUTS,
    LINEAR,
    SEEDS,
    Layout,
    adapt_every_weight,
    with_sparse,
)
from models import checkpoint_segments, randn, seeded, stock_moe, tiny_gpt2, token_ids
from modules import TiedEmbedding
from references import dense_weights, relative_distance, widened
from rosa_func.weight import sampled

# Of the largest gradient. Sums of some tens of products; of a value of 16 bits, 2^-9.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
M, N = 30, 26
EACH_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS, ids=str)
EACH_DTYPE = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
# On either side of what is computed entry by entry.
DENSITIES = {"few": 0.05, "many": 0.4}
deprecated_jit = pytest.mark.filterwarnings("ignore:.torch.jit")
performance_drop = pytest.mark.filterwarnings("ignore:There is a performance drop")


def layer_and_state(
    layout: Layout, dtype: torch.dtype, density: float = 0.05, r: int = 2
) -> tuple[nn.Module, TensorDict]:
    module = seeded(lambda: layout.build(M, N)).to(dtype)
    return module, with_sparse(adapt_every_weight(module, r), density)


def masked(module: nn.Module, trainable: TensorDict, state: TensorDict, *args: Any) -> Tensor:
    """Return the module's output in float64 with dense weights, by no code of the library."""
    weights = dense_weights(widened(state.replace(trainable=trainable)))
    result: Tensor = functional_call(module, weights, tuple(map(widened, args)))
    return result


def composed(module: nn.Module, trainable: TensorDict, state: TensorDict, *args: Any) -> Tensor:
    result: Tensor = rosa_func.call(module, state.replace(trainable=trainable), *args)
    return result


def loss_of(output: Tensor) -> Tensor:
    return output.square().sum()


def gradients(
    compute: Callable[..., Tensor], module: nn.Module, state: TensorDict, x: Tensor
) -> list[Tensor]:
    """Return the output, and the loss's gradients by all leaves and by x."""
    leaves = {name: leaf.detach().clone() for name, leaf in state["trainable"].items()}
    trainable = TensorDict(leaves).apply(lambda leaf: leaf.requires_grad_())
    by = list(trainable.values(include_nested=True, leaves_only=True))
    if x.is_floating_point():
        by.append(x := x.clone().requires_grad_())
    output = compute(module, trainable, state, x)
    return [output.detach(), *torch.autograd.grad(loss_of(output), by)]


def assert_close(found: Any, expected: Any, dtype: torch.dtype, times: float = 1) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert relative_distance(one.double(), other.double()) <= times * TOLERANCE[dtype]


class TestGradients:
    @EACH_LAYOUT
    @EACH_DTYPE
    @pytest.mark.parametrize("density", DENSITIES.values(), ids=DENSITIES)
    def test_those_of_factors_values_and_inputs_are_the_masked_ones(self, layout, dtype, density):
        module, state = layer_and_state(layout, dtype, density)
        x = layout.input(M, N, dtype)
        expected = gradients(masked, module, state, x)
        assert_close(gradients(composed, module, state, x), expected, dtype)
        assert expected[-1].any()

    @pytest.mark.parametrize("layout", [LINEAR, CONV1D, CONV2D], ids=str)
    def test_a_bias_that_trains_beside_them(self, layout):
        module = seeded(lambda: layout.build(M, N)).double()
        state = rosa_func.init(module, 2, targets="weight", train="bias")
        state, x = with_sparse(state, 0.05), layout.input(M, N, torch.float64)
        expected = gradients(masked, module, state, x)
        assert_close(gradients(composed, module, state, x), expected, torch.float64)

    @given(
        m=st.integers(1, 40), n=st.integers(1, 40), tokens=st.integers(0, 600), k=SEEDS, seed=SEEDS
    )
    def test_any_shape_tokens_and_support(self, m, n, tokens, k, seed):
        """Tokens beyond one chunk, none at all, one row, one column, one place, all places."""
        places = torch.randperm(m * n, generator=torch.Generator().manual_seed(seed))
        support = places[: 1 + k % (m * n)].sort().values.int()
        left, right = randn(tokens, m, seed=seed), randn(tokens, n, seed=seed + 1)
        found = sampled.entries(left, right, support)
        expected = (left.double().T @ right.double()).flatten()[support.long()]
        assert found.dtype == torch.float32
        # One product after another: g = t u / (1 - t u) of the sum of magnitudes.
        bound = (left.double().abs().T @ right.double().abs()).flatten()[support.long()]
        assert ((found - expected).abs() <= (tokens + 1) * 2**-24 * 1.01 * bound).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_entries_of_16_bit_are_summed_in_float32(self, dtype):
        """4,096 ones that are summed in bfloat16 make 256."""
        ones = torch.ones(4096, 8, dtype=dtype)
        support = torch.tensor([3, 60], dtype=torch.int32)
        assert sampled.entries(ones, ones, support).tolist() == [4096.0, 4096.0]

    @EACH_DTYPE
    def test_a_weight_that_is_embedding_and_head(self, dtype):
        module, ids = seeded(TiedEmbedding).to(dtype), torch.tensor([[1, 0, 8, 3], [2, 2, 1, 5]])
        state = with_sparse(rosa_func.init(module, 2, targets="embed"), 0.1)
        expected = gradients(masked, module, state, ids)
        assert_close(gradients(composed, module, state, ids), expected, dtype)

    @pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
    @pytest.mark.parametrize("r", [0, 2])
    def test_experts_of_transformers(self, implementation, r):
        """Rank 0 in a product of groups, whose rows have multiples of 16 bytes."""
        case = stock_moe("mixtral", implementation)
        state = with_sparse(rosa_func.init(case.model, r, targets="*experts*"), 0.1)
        leaves = rosa_func.named_parameters(state)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no batch is formed
            output = rosa_func.call(case.model, state, *case.args, **case.kwargs).logits
        found = torch.autograd.grad(loss_of(output), list(leaves.values()))
        dense = functional_call(case.model, dense_weights(state), case.args, case.kwargs).logits
        expected = torch.autograd.grad(loss_of(dense), list(leaves.values()))
        assert relative_distance(output, dense) <= 1e-5
        for one, other in zip(found, expected, strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm()

    def test_a_model_whose_segments_are_computed_again(self):
        model, ids = seeded(lambda: tiny_gpt2(layers=2)), token_ids(2, 6)
        state = with_sparse(rosa_func.init(model, 2), 0.05)
        leaves = list(rosa_func.parameters(state))
        checkpoint_segments(model.train(), {"use_reentrant": False})
        output = rosa_func.call(model, state, ids, use_cache=False).logits
        found = torch.autograd.grad(loss_of(output), leaves)
        checkpoint_segments(model, on=False)
        dense = functional_call(model, dense_weights(state), (ids,), {"use_cache": False}).logits
        expected = torch.autograd.grad(loss_of(dense), leaves)
        for one, other in zip(found, expected, strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm()


class TestTransforms:
    @EACH_LAYOUT
    def test_grad(self, layout):
        module, state = layer_and_state(layout, torch.float64)
        x = layout.input(M, N, torch.float64)
        found, expected = (
            grad(lambda t, f=f: loss_of(f(module, t, state, x)))(state["trainable"])
            for f in (composed, masked)
        )
        assert_close(found.values(True, True), expected.values(True, True), torch.float64)

    @performance_drop
    @pytest.mark.parametrize("layout", [LINEAR, CONV1D, EMBEDDING], ids=str)
    def test_vmap_of_grad_over_samples(self, layout):
        module, state = layer_and_state(layout, torch.float64)
        x = layout.input(M, N, torch.float64)[:4].unsqueeze(1)
        found, expected = (
            vmap(grad(lambda t, x, f=f: loss_of(f(module, t, state, x))), (None, 0))(
                state["trainable"], x
            )
            for f in (composed, masked)
        )
        assert_close(found.values(True, True), expected.values(True, True), torch.float64)

    @performance_drop
    @pytest.mark.parametrize("layout", [LINEAR, CONV1D, EMBEDDING], ids=str)
    def test_vmap_over_states_with_supports_of_their_own(self, layout):
        module = seeded(lambda: layout.build(M, N)).double()
        states = [with_sparse(adapt_every_weight(module, 2, key=s), 0.05, s) for s in range(3)]
        x, stack = layout.input(M, N, torch.float64), torch.stack(states)

        def loss(trainable: TensorDict, state: TensorDict) -> Tensor:
            return loss_of(composed(module, trainable, state, x))

        outputs = vmap(lambda state: composed(module, state["trainable"], state, x))(stack)
        found = vmap(grad(loss))(stack["trainable"], stack)
        for place, state in enumerate(states):
            expected = masked(module, state["trainable"], state, x)
            assert_close([outputs[place]], [expected], torch.float64)
            slopes = grad(lambda t, s=state: loss_of(masked(module, t, s, x)))(state["trainable"])
            assert_close(found[place].values(True, True), slopes.values(True, True), torch.float64)

    @deprecated_jit
    @pytest.mark.parametrize("layout", [LINEAR, CONV1D, EMBEDDING], ids=str)
    def test_jvp_and_hessian(self, layout):
        module, state = layer_and_state(layout, torch.float64)
        x, name = layout.input(M, N, torch.float64)[:3], next(iter(state["input_dim"].keys()))
        tangent = state["trainable"].apply(lambda leaf: randn(*leaf.shape, dtype=leaf.dtype))

        def of_values(f: Any, values: Tensor, x: Tensor) -> Tensor:
            trainable = state["trainable"].clone()
            trainable[name, "values"] = values
            return loss_of(f(module, trainable, state, x))

        slopes, curves = [], []
        for f in (composed, masked):
            by_t = lambda t, f=f: f(module, t, state, x)  # noqa: E731
            slopes += jvp(by_t, (state["trainable"],), (tangent,))
            values = state["trainable", name, "values"]
            by = (1,) if layout is EMBEDDING else (1, 2)
            curves.append(hessian(of_values, by)(f, values, x))
        assert_close(slopes[:2], slopes[2:], torch.float64)
        found, expected = (torch.utils._pytree.tree_leaves(c) for c in curves)
        assert_close(found, expected, torch.float64)
        assert expected[0].any()

    @pytest.mark.parametrize("layout", [a for a in LAYOUTS if a is not EMBEDDING], ids=str)
    def test_second_derivatives_of_plain_autograd(self, layout):
        """What a gradient penalty asks for; in backward, values and factors are read once more."""
        module, state = layer_and_state(layout, torch.float64)
        x, found = layout.input(M, N, torch.float64).requires_grad_(), []
        leaves = rosa_func.parameters(state)
        for f in (composed, masked):
            output = loss_of(f(module, state["trainable"], state, x))
            first = torch.autograd.grad(output, [*leaves, x], create_graph=True)
            penalty = sum(g.square().sum() for g in first)
            found.append(torch.autograd.grad(penalty, [*leaves, x]))
        assert_close(*found, torch.float64)

    @pytest.mark.parametrize("layout", [LINEAR, CONV1D, EMBEDDING], ids=str)
    def test_compiles_as_one_graph(self, layout):
        torch.compiler.reset()
        module, state = layer_and_state(layout, torch.float32)
        x, leaves = layout.input(M, N, torch.float32), rosa_func.parameters(state)

        @torch.compile(backend="aot_eager", fullgraph=True)
        def loss(state: TensorDict, x: Tensor) -> Tensor:
            return loss_of(rosa_func.call(module, state, x))

        found = torch.autograd.grad(loss(state, x), leaves)
        expected = torch.autograd.grad(
            loss_of(masked(module, state["trainable"], state, x)), leaves
        )
        assert_close(found, expected, torch.float32)


class TestModes:
    @pytest.mark.parametrize("layout", [LINEAR, CONV1D], ids=str)
    def test_autocast(self, layout):
        module, state = layer_and_state(layout, torch.float32)
        x = layout.input(M, N, torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert composed(module, state["trainable"], state, x).dtype == torch.bfloat16
            found = gradients(composed, module, state, x)
        assert_close(found, gradients(masked, module, state, x), torch.bfloat16)

    def test_autocast_leaves_float64_alone(self):
        """A product with S was rounded to bfloat16: 4e-3 off."""
        module, state = layer_and_state(LINEAR, torch.float64)
        x = LINEAR.input(M, N, torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = gradients(composed, module, state, x)
        assert_close(found, gradients(masked, module, state, x), torch.float64)

    @EACH_LAYOUT
    def test_bind_no_grad_and_inference_mode_compute_the_same(self, layout):
        module, state = layer_and_state(layout, torch.float32)
        x = layout.input(M, N, torch.float32)
        expected = masked(module, state["trainable"], state, x)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode(), rosa_func.bind(module, state):
                assert relative_distance(module(x).double(), expected) <= 1e-5
                assert relative_distance(rosa_func.call(module, state, x), expected) <= 1e-5
