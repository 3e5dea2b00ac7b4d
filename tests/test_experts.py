"""Mixtures of experts: each matrix of a 3-D weight has factors of its own, in all that uses it."""

import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import rosa_func
from models import MOE_NAMES, ModelCall, stock_moe
from modules import ExpertsInALoop
from references import model_snapshot, perturbed, relative_distance, state_bytes
from rosa_func import checkpoint, export, samplers
from rosa_func.module import RosaModule
from rosa_func.weight import Composed

IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]
EACH = pytest.mark.parametrize("name", MOE_NAMES)
SOME = pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])


def logits(case: ModelCall, state) -> Tensor:
    result: Tensor = rosa_func.call(case.model, state, *case.args, **case.kwargs).logits
    return result


def expert_weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if p.ndim == 3}


@EACH
def test_experts_are_adapted_by_default_and_routers_are_not(name):
    model = stock_moe(name).model
    state = rosa_func.init(model, 2)
    experts = expert_weights(model)
    assert experts and set(experts) <= set(state["input_dim"].keys())
    for expert, W in experts.items():
        A, B = (state["trainable", expert, factor] for factor in "AB")
        assert A.shape == (*W.shape[:2], 2) and B.shape == (W.shape[0], 2, W.shape[2])
        transposed = name == "gpt-oss"
        assert int(state["input_dim", expert]) == (-2 if transposed else -1)
    routers = [n for n in state["frozen"].keys() if "router" in n or n.endswith(".gate.weight")]
    routers += [n for n in state["frozen"].keys() if "shared_expert_gate" in n]
    assert routers and not set(routers) & set(state["input_dim"].keys())


@EACH
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("r", [1, 3, 8])
def test_outputs_and_gradients_are_those_of_the_dense_model(name, implementation, r):
    case = stock_moe(name, implementation)
    state = perturbed(rosa_func.init(case.model, {"*experts*": r, "*": 2}))
    leaves = rosa_func.named_parameters(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no batch is formed
        result = logits(case, state)
    result.square().mean().backward()
    weights = {n: w.clone().requires_grad_() for n, w in rosa_func.merge(state).items()}
    dense = functional_call(case.model, weights, case.args, case.kwargs).logits
    dense.square().mean().backward()
    assert relative_distance(result, dense) <= 1e-5
    for name_ in state["input_dim"].keys():
        A, B, dW = leaves[f"{name_}.A"], leaves[f"{name_}.B"], weights[name_].grad
        for found, expected in ((A.grad, dW @ B.mT), (B.grad, A.mT @ dW)):
            assert (found - expected).norm() <= 1e-5 * expected.norm(), name_


@SOME
def test_resample_merge_count_delta_and_files_know_experts(name):
    case = stock_moe(name)
    before = model_snapshot(case.model)
    state = perturbed(rosa_func.init(case.model, 2, exact=True), 0.01)
    start = rosa_func.merge(rosa_func.init(case.model, 2, exact=True))
    assert all(torch.equal(start[n], p) for n, p in case.model.named_parameters())
    expected = logits(case, state)
    new = rosa_func.resample(state, 1, r=3, sampler=samplers.projection)
    assert relative_distance(logits(case, new), expected) <= 1e-5
    merged, again = rosa_func.merge(state), rosa_func.merge(new)
    assert all(torch.equal(merged[n], w) for n, w in again.items())
    counted = rosa_func.count(state).weights
    for expert, W in expert_weights(case.model).items():
        E, m, n = W.shape
        assert counted[expert] == (E * 2 * (m + n), E * m * n)
    change = checkpoint.delta(new, case.model)
    weights = checkpoint.apply_delta(case.model, change)
    for n, w in merged.items():
        assert (weights[n] - w).norm() <= 1e-5 * w.norm()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        checkpoint.save(path, new)
        assert state_bytes(checkpoint.load(path)[0]) == state_bytes(new)
    assert model_snapshot(case.model) == before


@SOME
def test_bind_modules_and_merged_models_compute_the_same(name):
    case = stock_moe(name)
    state = perturbed(rosa_func.init(case.model, 2))
    expected = logits(case, state)
    with rosa_func.bind(case.model, state) as bound:
        assert torch.equal(bound(*case.args, **case.kwargs).logits, expected)
    module = RosaModule(case.model, state)
    assert torch.equal(module(*case.args, **case.kwargs).logits, expected)
    module.resample(1)
    assert relative_distance(module(*case.args, **case.kwargs).logits, expected) <= 1e-5
    merged = export.to_module(case.model, state)
    assert relative_distance(merged(*case.args, **case.kwargs).logits, expected) <= 1e-5


def test_the_draw_of_an_expert_does_not_depend_on_how_many_there_are():
    many, few = (Stack(count) for count in (4, 2))
    few.load_state_dict({"weight": many.weight[:2]})
    one, other = (rosa_func.init(module, 2, targets="weight") for module in (many, few))
    assert torch.equal(one["trainable", "weight", "A"][:2], other["trainable", "weight", "A"])
    A = one["trainable", "weight", "A"]
    assert not torch.allclose(A[0], A[1])


class Stack(nn.Module):
    """Matrices in one weight, used in a way that is given."""

    def __init__(self, count: int = 3, use=torch.matmul) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(count and 0)
        self.weight = nn.Parameter(torch.randn(count, 5, 4, generator=generator))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight)


USES = {
    "x @ W": (lambda x, w: x @ w, (3, 2, 5)),
    "bmm": (lambda x, w: torch.bmm(x, w), (3, 2, 5)),
    "W @ x": (lambda x, w: w @ x, (3, 4, 2)),
    "x @ W.mT": (lambda x, w: x @ w.mT, (3, 2, 4)),
    "x @ W.transpose": (lambda x, w: x @ w.transpose(-1, -2), (3, 2, 4)),
    "an expert": (lambda x, w: x @ w[1], (2, 5)),
    "an expert by a tensor": (lambda x, w: x @ w[torch.tensor(2)], (2, 5)),
    "the last expert": (lambda x, w: x @ w[-1], (2, 5)),
    "an expert's transpose": (lambda x, w: x @ w.mT[0], (2, 4)),
    "gathered": (lambda x, w: torch.bmm(x, w[torch.tensor([2, 0, 2, 1])]), (4, 1, 5)),
    "each in a loop": (lambda x, w: sum(x @ w[e] for e in range(3)), (2, 5)),
}


@pytest.mark.parametrize(("use", "shape"), USES.values(), ids=USES)
def test_products_with_a_batch_apply_the_factors(use, shape):
    module = Stack(3, use)
    state = perturbed(rosa_func.init(module, 2, targets="weight"))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    leaves = rosa_func.parameters(state)
    W = rosa_func.merge(state)["weight"].requires_grad_()
    result, expected = rosa_func.call(module, state, x), use(x, W)
    assert relative_distance(result, expected) <= 1e-5
    (d_x, *found) = torch.autograd.grad(result.square().sum(), [x, *leaves])
    d, dW = torch.autograd.grad(expected.square().sum(), [x, W])
    A, B = leaves
    for one, other in zip([d_x, *found], [d, dW @ B.mT, A.mT @ dW], strict=True):
        assert relative_distance(one, other) <= 1e-5


@pytest.mark.parametrize(
    "use",
    [lambda x, w: torch.einsum("ti,eij->tej", x, w), lambda x, w: x @ w.sum(0)],
    ids=["einsum", "sum"],
)
def test_what_has_no_rule_is_right_and_said_to_be_slow_once(use):
    module, x = Stack(3, use), torch.ones(2, 5)
    state = perturbed(rosa_func.init(module, 2, targets="weight"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        results = [rosa_func.call(module, state, x) for _ in range(3)]
    assert [str(warning.message)[-4:] for warning in caught] == ["slow"]
    assert "(3, 5, 4)" in str(caught[0].message)
    module.load_state_dict(rosa_func.merge(state))
    assert all(relative_distance(result, module(x)) <= 1e-5 for result in results)


def test_a_rank_is_limited_by_one_matrix_of_the_batch():
    module = Stack(3)
    with pytest.raises(ValueError, match=r"rank 5 is larger than min\(5, 4\) = 4 of weight"):
        rosa_func.init(module, 5, targets="weight")
    assert rosa_func.init(module, 4, targets="weight")["trainable", "weight", "B"].shape[1] == 4
    state = rosa_func.init(module, 0.5, targets="weight")
    with pytest.raises(ValueError, match=r"rank 6 is larger than min\(5, 4\)"):
        rosa_func.resample(state, 1, r=6)


def test_biases_of_experts_are_no_matrices():
    model = stock_moe("gpt-oss").model
    state = rosa_func.init(model, 2, targets="*experts*")
    assert {name.rpartition(".")[2] for name in state["input_dim"].keys()} == {
        "gate_up_proj",
        "down_proj",
    }
    with pytest.raises(ValueError, match="matches only"):
        rosa_func.init(model, 2, targets="*gate_up_proj_bias")


def test_a_state_of_another_number_of_experts_is_refused():
    state = rosa_func.init(Stack(3), 2, targets="weight")
    other = Stack(4)
    before = model_snapshot(other)
    with pytest.raises(ValueError, match=r"weight has shape \(3, 5, 4\) in the state and \(4, 5"):
        rosa_func.call(other, state, torch.ones(4, 2, 5))
    broken = state.clone()
    broken["trainable", "weight", "A"] = torch.ones(2, 5, 2)
    with pytest.raises(ValueError, match=r"weight.*\(2, 5, 2\)"):
        rosa_func.merge(broken)
    assert model_snapshot(other) == before


def test_a_composed_batch_keeps_its_matrices_composed():
    weight = rosa_func.compose(rosa_func.init(Stack(3), 2, targets="weight"))["weight"]
    assert isinstance(weight[0], Composed) and weight[0].shape == (5, 4)
    assert isinstance(weight.mT, Composed) and weight.mT.shape == (3, 4, 5)
    assert isinstance(weight[torch.tensor([1, 1])], Composed)
    assert weight[0] is weight[0]  # taken apart once


def test_matrices_taken_without_gradients_do_not_stand_in_for_those_with_them():
    """Inside one `bind`, an evaluation comes before training, and an optimizer steps."""
    model, x = ExpertsInALoop(5, 4), torch.ones(3, 2, 4)
    state = perturbed(rosa_func.init(model, 2, targets="weight"))
    other = state.clone()
    optimizers = [torch.optim.SGD(rosa_func.parameters(s), 0.1) for s in (state, other)]
    with rosa_func.bind(model, state):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                model(x)
            optimizers[0].zero_grad()
            model(x).square().sum().backward()
            optimizers[0].step()
    for _ in range(2):
        optimizers[1].zero_grad()
        rosa_func.call(model, other, x).square().sum().backward()
        optimizers[1].step()
    assert state_bytes(state) == state_bytes(other)
