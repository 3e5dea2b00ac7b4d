"""torch.func and torch.compile through a stock model, against the dense weights as reference."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, grad_and_value, jvp, vmap

import rosa_func
from cases import ANY_SAMPLER
from models import randn, seeded, tiny_gpt2, token_ids, two_layers
from references import dense_weights, main_output, perturbed, relative_distance
from rosa_func import _torch, export, samplers

IDS = token_ids(3, 6)
TOLERANCE = 1e-5  # float32: two ways to sum the same tens of products, over a few layers
# Warnings of torch about its own code.
performance_drop = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
deprecated_jit = pytest.mark.filterwarnings("ignore:.torch.jit")
instantiated = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
skipped = pytest.mark.filterwarnings("ignore:Skipping serialization of:UserWarning")
seeds = st.integers(0, 2**40)


def language_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gpt2_and_trained_state(
    sampler: samplers.Sampler = samplers.random,
    key: int = 0,
    inner: bool = False,
    exact: bool | None = None,
    **options: object,
) -> tuple[nn.Module, TensorDict]:
    """Return a small GPT-2 and a state of it as if trained.

    Embeddings and norms are trained too, unless `inner`. With `inner` the input of the first layer
    does not depend on what is trained: under vmap the factors have a batch and that input has none.
    """
    model = seeded(lambda: tiny_gpt2(**options)).eval()
    targets, train = (None, ()) if inner else (["wte", "c_attn", "c_proj", "c_fc"], "*ln_*")
    state = rosa_func.init(
        model, 3, key=key, sampler=sampler, targets=targets, train=train, exact=exact
    )
    return model, perturbed(state, seed=key % 2**32)


def loss_of(model: nn.Module, state: TensorDict, weights=None):
    """Return the loss as a function of the trainable part, by `call` or by other weights."""

    def loss(trainable: TensorDict, ids: Tensor = IDS) -> Tensor:
        new = state.replace(trainable=trainable)
        if weights is None:
            return language_loss(rosa_func.call(model, new, ids, use_cache=False).logits, ids)
        out = functional_call(model, weights(new), (ids,), {"use_cache": False})
        return language_loss(out.logits, ids)

    return loss


def reference_gradients(model: nn.Module, state: TensorDict, ids: Tensor = IDS) -> dict:
    """Return {path: gradient} by plain autograd through R + A B, with no code of the library."""
    trainable = state["trainable"].apply(lambda t: t.detach().clone().requires_grad_())
    leaves = dict(trainable.items(include_nested=True, leaves_only=True))
    loss = loss_of(model, state, dense_weights)(trainable, ids)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def assert_close(gradients: TensorDict, expected: dict, tolerance: float = TOLERANCE) -> None:
    found = dict(gradients.items(include_nested=True, leaves_only=True))
    assert found.keys() == expected.keys()
    # Against the largest of all gradients: some are zero up to rounding (the bias of the keys).
    largest = max(value.abs().max() for value in expected.values())
    for path, value in expected.items():
        assert (found[path] - value).abs().max() <= tolerance * largest, path


@given(sampler=ANY_SAMPLER, key=seeds)
def test_grad_and_value_give_the_gradients_of_the_dense_model(sampler, key):
    model, state = gpt2_and_trained_state(sampler, key)
    gradients, value = grad_and_value(loss_of(model, state))(state["trainable"])
    assert_close(gradients, reference_gradients(model, state))
    assert (
        relative_distance(value, loss_of(model, state, dense_weights)(state["trainable"]))
        <= TOLERANCE
    )
    assert_close(grad(loss_of(model, state))(state["trainable"]), reference_gradients(model, state))


@given(sampler=ANY_SAMPLER, key=seeds)
def test_backward_gives_the_gradients_of_the_dense_model(sampler, key):
    model, state = gpt2_and_trained_state(sampler, key)
    expected = reference_gradients(model, state)
    rosa_func.parameters(state)
    loss_of(model, state)(state["trainable"]).backward()
    assert_close(state["trainable"].apply(lambda leaf: leaf.grad), expected)


@performance_drop
@given(sampler=ANY_SAMPLER, key=seeds, inner=st.booleans())
def test_vmap_over_stacked_adapters(sampler, key, inner):
    model, state = gpt2_and_trained_state(sampler, key, inner)
    adapters = [perturbed(state, seed=seed)["trainable"] for seed in range(3)]

    def logits(trainable: TensorDict) -> Tensor:
        new = state.replace(trainable=trainable)
        return rosa_func.call(model, new, IDS, use_cache=False).logits

    together = vmap(logits)(torch.stack(adapters))
    for adapter, result in zip(adapters, together, strict=True):
        weights = dense_weights(state.replace(trainable=adapter))
        assert (
            relative_distance(result, functional_call(model, weights, (IDS,)).logits) <= TOLERANCE
        )


@performance_drop
@pytest.mark.parametrize("exact", [None, True])
@pytest.mark.parametrize("sampler", [samplers.random, samplers.lora])
def test_vmap_over_stacked_states_of_different_keys(sampler, exact):
    """The README stacked what trains alone, though each state has its own R: 0.2 to 0.6 off."""
    model = seeded(tiny_gpt2).eval()
    states = [
        perturbed(rosa_func.init(model, 2, key=key, sampler=sampler, exact=exact), seed=key)
        for key in range(3)
    ]
    together = vmap(lambda s: rosa_func.call(model, s, IDS, use_cache=False).logits)(
        torch.stack(states)
    )
    for state, result in zip(states, together, strict=True):
        expected = functional_call(model, dense_weights(state), (IDS,)).logits
        assert relative_distance(result, expected) <= TOLERANCE


@performance_drop
@pytest.mark.parametrize("inner", [False, True])
def test_vmap_of_grad_over_stacked_adapters(inner):
    model, state = gpt2_and_trained_state(inner=inner)
    adapters = [perturbed(state, seed=seed)["trainable"] for seed in range(3)]
    gradients = vmap(grad(loss_of(model, state)))(torch.stack(adapters))
    for adapter, gradient in zip(adapters, gradients.unbind(0), strict=True):
        assert_close(gradient, reference_gradients(model, state.replace(trainable=adapter)))


@performance_drop
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_per_sample_gradients(attention):
    model, state = gpt2_and_trained_state()
    model.set_attn_implementation(attention)

    def loss(trainable: TensorDict, sample: Tensor) -> Tensor:
        return loss_of(model, state)(trainable, sample[None])

    gradients = vmap(grad(loss), in_dims=(None, 0))(state["trainable"], IDS)
    for sample, gradient in zip(IDS, gradients.unbind(0), strict=True):
        assert_close(gradient, reference_gradients(model, state, sample[None]))


@deprecated_jit
@given(sampler=ANY_SAMPLER, key=seeds)
def test_jvp_is_the_slope_along_a_tangent(sampler, key):
    model, state = gpt2_and_trained_state(sampler, key)
    model.set_attn_implementation("eager")
    tangent = state["trainable"].apply(torch.ones_like)
    value, slope = jvp(loss_of(model, state), (state["trainable"],), (tangent,))
    expected = reference_gradients(model, state)
    total = sum(gradient.sum() for gradient in expected.values())
    scale = sum(gradient.abs().sum() for gradient in expected.values())
    assert abs(slope - total) <= TOLERANCE * scale
    assert (
        relative_distance(value, loss_of(model, state, dense_weights)(state["trainable"]))
        <= TOLERANCE
    )


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@instantiated
@pytest.mark.parametrize(("exact", "backend"), [(None, "aot_eager"), (True, "eager")])
def test_grad_and_value_compiles_as_one_whole_graph(fresh_compiler, exact, backend):
    model, state = gpt2_and_trained_state(layers=1, exact=exact)
    assert ("compensation" in state.keys()) == bool(exact)
    step = torch.compile(grad_and_value(loss_of(model, state)), fullgraph=True, backend=backend)
    for seed in range(2):  # the second call runs what the first has compiled
        new = state.replace(trainable=perturbed(state, seed=seed)["trainable"])
        ids = token_ids(3, 6, seed=seed)
        gradients, value = step(new["trainable"], ids)
        assert_close(gradients, reference_gradients(model, new, ids))
        assert (
            relative_distance(value, loss_of(model, state, dense_weights)(new["trainable"], ids))
            <= TOLERANCE
        )


@deprecated_jit
@instantiated
@skipped
@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler"
)
def test_grad_and_value_compiles_with_inductor(fresh_compiler):
    model = seeded(lambda: nn.Sequential(nn.Embedding(31, 6), nn.Linear(6, 8), nn.Linear(8, 3)))
    state = perturbed(rosa_func.init(model, 2, targets="*.weight"))

    def loss(trainable: TensorDict) -> Tensor:
        return rosa_func.call(model, state.replace(trainable=trainable), IDS).square().mean()

    compiled = torch.compile(grad_and_value(loss), fullgraph=True, backend="inductor")
    (gradients, value), (expected, loss_value) = (
        step(state["trainable"]) for step in (compiled, grad_and_value(loss))
    )
    assert_close(gradients, dict(expected.items(include_nested=True, leaves_only=True)))
    assert relative_distance(value, loss_value) <= TOLERANCE


# Dropout.


@performance_drop
def test_dropout_under_vmap_needs_a_choice_of_randomness():
    model, state = gpt2_and_trained_state(dropout=0.5)
    model.train()
    twice = torch.stack([state["trainable"]] * 2)

    def logits(trainable: TensorDict) -> Tensor:
        new = state.replace(trainable=trainable)
        return rosa_func.call(model, new, IDS, use_cache=False).logits

    with torch.random.fork_rng(devices=[]):
        first, second = vmap(logits, randomness="different")(twice)
        assert relative_distance(first, second) > 0.01
        first, second = vmap(logits, randomness="same")(twice)
        assert relative_distance(first, second) <= TOLERANCE
        with pytest.raises(RuntimeError, match="randomness"):
            vmap(logits)(twice)
        gradients = vmap(grad(loss_of(model, state)), randomness="different")(twice)
    assert all(g.isfinite().all() for g in gradients.values(True, True))


def test_dropout_draws_the_masks_of_the_dense_model():
    model, state = gpt2_and_trained_state(dropout=0.5)
    model.train()
    by_factors = seeded(lambda: loss_of(model, state)(state["trainable"]))
    by_dense = seeded(lambda: loss_of(model, state, dense_weights)(state["trainable"]))
    assert relative_distance(by_factors, by_dense) <= TOLERANCE
    assert relative_distance(by_factors, loss_of(model.eval(), state)(state["trainable"])) > 0.01


# Training loops written by hand.


def test_functional_call_with_composed_weights_computes_the_model():
    model, args, kwargs = seeded(tiny_gpt2).eval(), (IDS,), {"use_cache": False}
    expected = model(*args, **kwargs).logits
    state = rosa_func.init(model, 2)
    for key in range(3):
        state = rosa_func.resample(state, key)
        out = torch.func.functional_call(model, rosa_func.compose(state), args, kwargs)
        assert relative_distance(out.logits, expected) <= TOLERANCE


def test_a_functional_loop_takes_the_steps_of_a_torch_optimizer():
    model, state = gpt2_and_trained_state()
    by_optimizer = state.clone()
    optimizer = torch.optim.SGD(rosa_func.parameters(by_optimizer), 0.1)
    for _ in range(3):
        gradients, value = grad_and_value(loss_of(model, state))(state["trainable"])
        trainable = state["trainable"].apply(lambda leaf, g: leaf - 0.1 * g, gradients)
        state = state.replace(trainable=trainable)
        optimizer.zero_grad()
        result = rosa_func.call(model, by_optimizer, IDS, use_cache=False)
        loss = language_loss(main_output(result), IDS)
        loss.backward()
        optimizer.step()
        assert relative_distance(value, loss) <= TOLERANCE
    for one, other in zip(
        rosa_func.parameters(state), rosa_func.parameters(by_optimizer), strict=True
    ):
        assert relative_distance(one, other) <= TOLERANCE


@deprecated_jit
def test_second_derivatives_and_forward_mode_of_plain_autograd():
    """Outside torch.func the product is an autograd.Function with derivatives of its own."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).double()
    state, x = rosa_func.init(model, 2, train="0.bias"), randn(3, 4, dtype=torch.float64)
    named = rosa_func.named_parameters(state)

    def of(*values: Tensor) -> Tensor:
        trainable = rebuilt(dict(zip(named, values, strict=True)))
        return rosa_func.call(model, state.replace(trainable=trainable), x)

    def rebuilt(values: dict[str, Tensor]) -> TensorDict:
        factors = {
            f"{i}.weight": {"A": values[f"{i}.weight.A"], "B": values[f"{i}.weight.B"]}
            for i in (0, 2)
        }
        return TensorDict(factors | {"0.bias": values["0.bias"]})

    assert torch.autograd.gradcheck(of, tuple(named.values()), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(of, tuple(named.values()))


# Export, tensors without values, tracing.


class Holds(nn.Module):
    """A module that computes with a state it holds, or with one that it is given."""

    def __init__(self, by, model: nn.Module, state: TensorDict | None = None) -> None:
        super().__init__()
        self.by, self.model, self.state = by, model, state

    def forward(self, x: Tensor, state: TensorDict | None = None) -> Tensor:
        return self.by(self.model, self.state if state is None else state, x)


def by_compose(model: nn.Module, state: TensorDict, x: Tensor) -> Tensor:
    return functional_call(model, rosa_func.compose(state), (x,))


EVERY_WAY = pytest.mark.parametrize("by", [rosa_func.call, by_compose], ids=["call", "compose"])


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about its own graphs
@EVERY_WAY
@pytest.mark.parametrize("strict", [True, False])
def test_torch_export_follows_a_state(by, strict, fresh_compiler):
    """With strict=False it ended in "Creating a new Tensor subclass Composed"."""
    if strict and _torch._HAS_OLD_DYNAMO:
        pytest.skip("torch before 2.11 exports the model's own weights by any functional_call")
    model, x = two_layers(), randn(3, 6)
    state = perturbed(rosa_func.init(model, 2))
    expected = by_compose(model, state, x)
    exported = torch.export.export(Holds(by, model, state), (x,), strict=strict)
    assert relative_distance(exported.module()(x), expected) <= TOLERANCE
    assert relative_distance(by(model, state, x), expected) <= TOLERANCE  # and all works as before


@EVERY_WAY
def test_tensors_without_values_go_through(by):
    """FakeTensorMode ended in "Creating a new Tensor subclass Composed"."""
    model, x = two_layers(), randn(3, 6)
    state = perturbed(rosa_func.init(model, 2))
    expected = by(model, state, x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = by(model, state, mode.from_tensor(x))
    assert fake.shape == expected.shape and fake.dtype == expected.dtype
    assert torch.equal(by(model, state, x), expected)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_everything_on_device_meta_has_its_shapes(autocast, mode):
    """It ended in "unknown device type for autocast"."""
    model = nn.Sequential(nn.Embedding(31, 6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    state = rosa_func.init(model, 2, targets="*.weight").to("meta")
    leaves = rosa_func.parameters(state)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), mode():
        logits = rosa_func.call(model.to("meta"), state, IDS.to("meta"))
    assert logits.is_meta and logits.shape == (*IDS.shape, 3)
    if logits.requires_grad:
        logits.float().square().mean().backward()
        assert all(leaf.grad.is_meta and leaf.grad.shape == leaf.shape for leaf in leaves)


@deprecated_jit
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_names_what_can_be_traced():
    """It ended in "Cannot insert a Tensor that requires grad as a constant"."""
    model, x = two_layers(), randn(3, 6)
    state = perturbed(rosa_func.init(model, 2))
    with pytest.raises(ValueError, match=r"export\.to_module\(model, state\)"):
        torch.jit.trace(lambda x: rosa_func.compose(state)["0.weight"] @ x.T, (x,))
    merged = export.to_module(model, state)
    traced = torch.jit.trace(merged, (x,))
    assert relative_distance(traced(x), rosa_func.call(model, state, x)) <= TOLERANCE
