"""A base or a term that the library does not know works everywhere, once it is registered."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, jvp, vmap
from transformers.pytorch_utils import Conv1D

import rosa_func
from cases import ALL_PARTS, QUANTISED_BASES, Parts
from models import seeded
from modules import ExpertsInOneProduct
from references import dense_weights, model_snapshot, perturbed, relative_distance, state_bytes
from rosa_func import checkpoint, quantised
from rosa_func.module import RosaModule
from rosa_func.weight import layout
from rosa_func.weight.dense import Dense
from rosa_func.weight.layout import entries, leaves
from rosa_func.weight.low_rank import LowRank

pytestmark = [
    pytest.mark.usefixtures("toys"),
    pytest.mark.filterwarnings("ignore:.*forms a batch"),  # of toys, which have no other rule
]


def over(parts: list[Parts]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("parts", parts, ids=str)


IDS = torch.tensor([[1, 0, 8, 3], [2, 2, 1, 5], [0, 1, 2, 3]])
NAMES = ["0.weight", "1.weight", "3.weight", "4.weight"]
TOLERANCE = 1e-5
# All fields that a state of these parts may have of one weight, and what trains of them.
FIELDS = {"low rank": [], "scaled": ["scale"], "sparse": ["values"]}
FIELDS["scaled and sparse"] = [*FIELDS["sparse"], *FIELDS["scaled"]]


class SumOfExperts(ExpertsInOneProduct):
    """Experts that all see the whole input."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(-3) @ self.weight).sum(-3)


def make_model() -> nn.Sequential:
    return seeded(
        lambda: nn.Sequential(
            nn.Embedding(9, 6), nn.Linear(6, 8), nn.Tanh(), Conv1D(5, 8), SumOfExperts(5, 4)
        )
    )


def trained_state(parts: Parts, **options: Any) -> TensorDict:
    """Return a state of the model, as if trained, with these parts."""
    options = {"targets": NAMES, "train": "1.bias", **options}
    return perturbed(parts.put_into(rosa_func.init(make_model(), 2, **options)))


def loss_with(state: TensorDict, by_dense_weights: bool = False):
    """Return the loss as a function of the trainable part and the input."""
    model = make_model()

    def loss(trainable: TensorDict, ids: Tensor = IDS) -> Tensor:
        new = state.replace({"trainable": trainable})
        if by_dense_weights:
            return functional_call(model, dense_weights(new), (ids,)).square().sum()
        return rosa_func.call(model, new, ids).square().sum()

    return loss


def reference_gradients(state: TensorDict, ids: Tensor = IDS) -> dict[Any, Tensor]:
    """Return {path: gradient} by plain autograd through dense weights."""
    trainable = state["trainable"].apply(lambda leaf: leaf.detach().clone().requires_grad_())
    found = dict(trainable.items(include_nested=True, leaves_only=True))
    loss = loss_with(state, by_dense_weights=True)(trainable, ids)
    return dict(zip(found, torch.autograd.grad(loss, list(found.values())), strict=True))


def assert_close(gradients: TensorDict, expected: dict[Any, Tensor]) -> None:
    found = dict(gradients.items(include_nested=True, leaves_only=True))
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert relative_distance(found[path], value) <= TOLERANCE, path


@over(ALL_PARTS)
def test_every_way_to_compute_with_a_state_gives_the_same(parts: Parts):
    model, state = make_model(), trained_state(parts)
    before = model_snapshot(model)
    expected = functional_call(model, dense_weights(state), (IDS,))
    result = rosa_func.call(model, state, IDS)
    assert relative_distance(result, expected) <= TOLERANCE
    assert relative_distance(result, model(IDS)) > 0.01
    with rosa_func.bind(model, state) as bound:
        assert torch.equal(bound(IDS), result)
    assert torch.equal(rosa_func.call(rosa_func.skeleton(model), state, IDS), result)
    composed = functional_call(model, rosa_func.compose(state), (IDS,))
    assert torch.equal(composed, result)
    merged = rosa_func.export.to_module(model, state)
    assert relative_distance(merged(IDS), result) <= TOLERANCE
    for name, W in rosa_func.merge(state).items():
        assert relative_distance(W, dense_weights(state)[name]) <= 1e-6
    assert model_snapshot(model) == before


@over(ALL_PARTS)
def test_a_resample_keeps_the_function_and_starts_the_terms_anew(parts: Parts):
    model, state = make_model(), trained_state(parts, exact=True)
    new = rosa_func.resample(state, 1, r=3)
    result, expected = (rosa_func.call(model, s, IDS) for s in (new, state))
    # A residual is read without its compensation; an int8 one is off by half a step of 127.
    if parts.base in QUANTISED_BASES:  # that of the master
        result, expected = (
            functional_call(model, quantised.merge_into_master(s).weights, (IDS,))
            for s in (new, state)
        )
    assert relative_distance(result, expected) <= (0.02 if parts.base == "int8" else TOLERANCE)
    for name in NAMES:
        fields = new["trainable", name]
        assert fields["A"].shape[-1] == 3
        assert "scale" not in fields.keys() or (fields["scale"] == 1).all()
        assert "values" not in fields.keys() or not fields["values"].any()
        if "fixed" in state.keys():
            assert torch.equal(new["fixed", name, "support"], state["fixed", name, "support"])


@over(ALL_PARTS)
def test_leaves_are_named_counted_and_grouped(parts: Parts):
    state = trained_state(parts)
    fields = ["A", "B", *FIELDS[parts.terms]]
    named = rosa_func.named_parameters(state)
    assert list(named) == [f"{name}.{field}" for name in NAMES for field in fields] + ["1.bias"]
    counted = rosa_func.count(state)
    assert counted.trainable == sum(leaf.numel() for leaf in rosa_func.parameters(state))
    assert counted.total == sum(p.numel() for p in make_model().parameters())
    groups = rosa_func.optim.groups(
        state, input={"lr": 1.0}, output={"lr": 2.0}, values={"lr": 3.0}, full={"lr": 3.0}
    )
    rates = {id(leaf): group["lr"] for group in groups for leaf in group["params"]}
    by_side = {"A": 2.0, "B": 1.0}
    for name, leaf in named.items():
        side = name.rpartition(".")[2]
        if name[0] in "34":  # of Conv1D and of experts of (in, out), A is on the input side
            side = {"A": "B", "B": "A"}.get(side, side)
        expected = by_side.get(side)
        assert rates[id(leaf)] == (expected or 3.0), name


@pytest.mark.parametrize(
    "moments, fraction", [("reset", None), ("project", None), ("keep", None), ("prune", 0.5)]
)
@over(ALL_PARTS)
def test_an_optimizer_is_rebound(parts: Parts, moments: str, fraction: float | None):
    model, state = make_model(), trained_state(parts)
    optimizer = torch.optim.AdamW(rosa_func.parameters(state), 1e-2)

    def step(state: TensorDict) -> None:
        optimizer.zero_grad()
        rosa_func.call(model, state, IDS).square().sum().backward()
        optimizer.step()

    step(state)
    before = {name: dict(optimizer.state[leaf]) for name, leaf in leaves(state).items()}
    new = rosa_func.resample(state, 1)
    rosa_func.optim.rebind(optimizer, state, new, moments=moments, fraction=fraction)
    held = [leaf for group in optimizer.param_groups for leaf in group["params"]]
    assert {id(leaf) for leaf in held} == {id(leaf) for leaf in leaves(new).values()}
    for name in NAMES:
        for field in FIELDS[parts.terms]:
            slots = optimizer.state.get(leaves(new)[f"{name}.{field}"], {})
            old = before[f"{name}.{field}"]["exp_avg"]
            if field == "values":  # their gradients are the weight's, before and after
                assert torch.equal(slots["exp_avg"], old)
            elif moments == "reset":
                assert not slots
            elif moments == "prune":
                assert (slots["exp_avg"] == 0).sum() == round(old.numel() / 2)
            else:
                assert torch.equal(slots["exp_avg"], old)
    start = {name: leaf.detach().clone() for name, leaf in leaves(new).items()}
    step(new)
    assert not any(torch.equal(start[name], leaf) for name, leaf in leaves(new).items())


@over(ALL_PARTS)
def test_a_state_is_saved_and_loaded_bit_for_bit(parts: Parts, tmp_path: Path):
    state = trained_state(parts, exact=True)
    checkpoint.save(tmp_path / "run.safetensors", state, step=3)
    loaded, extra = checkpoint.load(tmp_path / "run.safetensors")
    assert state_bytes(loaded) == state_bytes(state) and extra == {"step": 3}
    assert checkpoint.digest(loaded) == rosa_func.distributed.check_equal(state)
    new, expected = (rosa_func.resample(s, 1) for s in (loaded, state))
    assert state_bytes(new) == state_bytes(expected)
    assert state_bytes(rosa_func.distributed.resample(state, 1)) == state_bytes(expected)


@over(ALL_PARTS)
def test_a_change_gives_the_merged_weights_back(parts: Parts):
    model, state = make_model(), trained_state(parts)
    change = checkpoint.delta(state, model)
    weights = checkpoint.apply_delta(model, change)
    for name, merged in rosa_func.merge(state).items():
        assert relative_distance(weights[name], merged) <= 1e-6


@over(ALL_PARTS)
def test_a_rosa_module_computes_trains_and_resamples(parts: Parts):
    model, state = make_model(), trained_state(parts)
    module, bits = RosaModule(model, state), state_bytes(state)
    expected = rosa_func.call(model, state, IDS)
    assert torch.equal(module(IDS), expected)
    assert dict(module.named_parameters()).keys() == {f"trainable.{name}" for name in leaves(state)}
    assert module.state_dict().keys() == {".".join(path) for path in entries(state)}
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    module(IDS).square().sum().backward()
    optimizer.step()
    own, merged = list(module.parameters()), rosa_func.merge(module.state)
    module.resample(1, optimizer=optimizer)
    assert all(one is other for one, other in zip(module.parameters(), own, strict=True))
    if parts.base == "dense":
        for name, W in rosa_func.merge(module.state).items():
            assert relative_distance(W, merged[name]) <= 1e-6
    other = RosaModule(model, state)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(IDS), module(IDS))
    assert state_bytes(state) == bits


@over(ALL_PARTS)
def test_gradients_by_transforms_are_those_of_the_dense_weights(parts: Parts):
    state = trained_state(parts)
    gradients, value = grad_and_value(loss_with(state))(state["trainable"])
    assert_close(gradients, reference_gradients(state))
    assert relative_distance(value, loss_with(state, True)(state["trainable"])) <= TOLERANCE


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@over(ALL_PARTS)
def test_vmap_of_gradients_over_states_and_over_samples(parts: Parts):
    state = trained_state(parts)
    trained = [perturbed(state, seed=seed)["trainable"] for seed in range(3)]
    together = vmap(grad(loss_with(state)))(torch.stack(trained))
    for one, gradients in zip(trained, together.unbind(0), strict=True):
        assert_close(gradients, reference_gradients(state.replace({"trainable": one})))
    each = vmap(grad(loss_with(state)), in_dims=(None, 0))(state["trainable"], IDS[:, None])
    for ids, gradients in zip(IDS, each.unbind(0), strict=True):
        assert_close(gradients, reference_gradients(state, ids[None]))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@over(ALL_PARTS)
@pytest.mark.filterwarnings("ignore:.torch.jit")  # of torch 2.14, in forward mode
def test_jvp_is_the_slope_along_a_tangent(parts: Parts):
    state = trained_state(parts)
    tangent = state["trainable"].apply(torch.ones_like)
    _, slope = jvp(loss_with(state), (state["trainable"],), (tangent,))
    expected = sum(gradient.sum() for gradient in reference_gradients(state).values())
    assert relative_distance(slope, expected) <= 10 * TOLERANCE


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) == (2, 11),
    reason="aot_autograd of torch 2.11 asks a tensor of grad for its storage",
)
@over([Parts("int8", "scaled and sparse"), Parts("nf4_double in blocks", "sparse")])
def test_gradients_compile_as_one_whole_graph(parts: Parts):
    torch.compiler.reset()
    state = trained_state(parts)
    step = torch.compile(grad(loss_with(state)), fullgraph=True, backend="aot_eager")
    for seed in range(2):  # the second call runs what the first has compiled
        new = state.replace({"trainable": perturbed(state, seed=seed)["trainable"]})
        assert_close(step(new["trainable"], IDS), reference_gradients(new))
    torch.compiler.reset()


@over([Parts("int8"), Parts(terms="scaled")])
def test_a_part_that_is_not_registered_is_named(parts: Parts, monkeypatch: pytest.MonkeyPatch):
    state = trained_state(parts)
    monkeypatch.setattr(layout, "BASES", [Dense])
    monkeypatch.setattr(layout, "TERMS", [LowRank])
    with pytest.raises(KeyError, match=r"0\.weight has the entries .*'scales?'"):
        rosa_func.merge(state)


def test_a_weight_without_factors_is_refused_where_they_are_needed():
    state = trained_state(Parts(terms="scaled"))
    state["trainable", "1.weight"] = state["trainable", "1.weight"].select("scale")
    rosa_func.merge(state)
    for use in (
        lambda: rosa_func.resample(state, 1),
        lambda: checkpoint.delta(state, make_model()),
    ):
        with pytest.raises(ValueError, match=r"\(8, 6\) has no factors A and B, but Scale"):
            use()


def test_a_term_may_have_gradients_of_its_own_and_no_product_in_place(monkeypatch):
    monkeypatch.setattr(LowRank, "apply_", None)
    state = trained_state(Parts())
    rosa_func.parameters(state)
    loss_with(state)(state["trainable"], IDS).backward()
    gradients = state["trainable"].apply(lambda leaf: leaf.grad)
    assert_close(gradients, reference_gradients(state))
