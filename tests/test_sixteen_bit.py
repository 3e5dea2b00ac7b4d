"""16-bit models with float32 factors: what dtype is formed where, and what it costs in accuracy."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rosa_func
from cases import SIXTEEN_BIT_DTYPES
from models import randn, seeded, stock_model, tiny_gpt2, token_ids
from references import perturbed, relative_distance
from rosa_func.module import RosaModule
from rosa_func.weight.layout import leaves


class FormedTensors(TorchDispatchMode):
    """Records the dtype and shape of every tensor formed, and the shapes that products form."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[torch.dtype, tuple[int, ...]]] = set()
        self.products: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.seen |= {(t.dtype, tuple(t.shape)) for t in tensors}
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.products |= {tuple(t.shape) for t in tensors}
        return result


def loss_of(model: nn.Module, state: TensorDict, ids: Tensor) -> Tensor:
    logits = rosa_func.call(model, state, ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def train(model: nn.Module, autocast: bool = False) -> tuple[list[float], TensorDict]:
    """Take 30 steps in two cycles on one batch; return the losses."""
    state = rosa_func.init(model, 2)
    optimizer = torch.optim.Adam(rosa_func.parameters(state), 1e-2)
    losses = []
    for step in range(30):
        if step == 15:
            new = rosa_func.resample(state, 1)
            rosa_func.optim.rebind(optimizer, state, new)
            state = new
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model, state, token_ids(4, 8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, state


def gpt2_with_usual_weights() -> Any:
    """Return a GPT-2 with weights of a usual size, at which 16 bits are used in practice."""
    return seeded(lambda: tiny_gpt2(initializer_range=0.05))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT_DTYPES, ids=str)
def test_a_16_bit_forward_pass_forms_no_dense_and_no_float32_weight(dtype: torch.dtype):
    model = gpt2_with_usual_weights().to(dtype)
    state = rosa_func.init(model, 2, targets=["c_attn", "c_proj", "c_fc"])
    rosa_func.parameters(state)
    with FormedTensors() as formed:
        # 15 tokens: no activation has the shape of a weight.
        logits = rosa_func.call(model, state, token_ids(3, 5), use_cache=False).logits
    assert logits.dtype == dtype
    shapes = {tuple(state["frozen", name].shape) for name in state["input_dim"].keys()}
    shapes |= {shape[::-1] for shape in shapes}
    assert not any((torch.float32, shape) in formed.seen for shape in shapes)
    assert formed.products
    assert not formed.products & shapes


@pytest.mark.parametrize("kind", ["bfloat16", "autocast"])
def test_the_loss_in_16_bit_follows_that_in_float32(kind: str):
    expected, _ = train(gpt2_with_usual_weights())
    assert expected[-1] < expected[0] - 0.3
    model = gpt2_with_usual_weights()
    model = model if kind == "autocast" else model.to(torch.bfloat16)
    losses, state = train(model, autocast=kind == "autocast")
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 2e-2
    assert {leaf.dtype for leaf in leaves(state).values()} == {torch.float32}
    assert {leaf.grad.dtype for leaf in leaves(state).values()} == {torch.float32}  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", SIXTEEN_BIT_DTYPES, ids=str)
def test_a_hundred_resamples_in_16_bit_drift_little(dtype: torch.dtype):
    model = gpt2_with_usual_weights().to(dtype)
    state = rosa_func.init(model, 2)
    for key in range(100):
        state = rosa_func.resample(state, key)
    for name, merged in rosa_func.merge(state).items():
        W = model.state_dict()[name].double()
        assert (merged.double() - W).norm() <= 1e-4 * W.norm()


def take_steps(masters: dict[str, Tensor], call: Callable[[], Tensor]) -> None:
    """Take 10 steps of Adam with tensors of which `call` computes the logits."""
    optimizer = torch.optim.Adam(list(masters.values()), 1e-4)
    for _ in range(10):
        optimizer.zero_grad()
        logits = call()[:, :-1].float()
        F.cross_entropy(logits.flatten(0, 1), token_ids(4, 8)[:, 1:].flatten()).backward()
        optimizer.step()


def trained_in_full(dtype: torch.dtype) -> tuple[nn.Module, TensorDict]:
    """Return a model, and a state of it whose norms and embeddings have moved a little."""
    model = gpt2_with_usual_weights().to(dtype)
    state = rosa_func.init(model, 2, train=["wte", "*ln_*"])
    return model, perturbed(state, 1e-2)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT_DTYPES, ids=str)
class TestTensorsTrainedInFull:
    def test_a_norm_trains_as_a_float32_master_that_is_cast_for_the_model(self, dtype: torch.dtype):
        """A norm of a bfloat16 Llama moved by exactly 0 in 50 steps of 1e-4: 1 - 1e-4 is 1."""
        model, ids = stock_model("llama", dtype).model, token_ids(4, 8)
        state = rosa_func.init(model, targets=(), train="norm")
        named = rosa_func.named_parameters(state)
        own = {name: p.detach() for name, p in model.named_parameters()}
        masters = {name: own[name].float().requires_grad_() for name in named}

        def expected() -> Tensor:
            cast = {name: master.to(dtype) for name, master in masters.items()}
            return functional_call(model, own | cast, (ids,), {"use_cache": False}).logits

        take_steps(masters, expected)
        take_steps(named, lambda: rosa_func.call(model, state, ids, use_cache=False).logits)
        for name, leaf in named.items():
            assert torch.equal(leaf, masters[name])
            assert 5e-4 < (leaf - own[name]).abs().max() < 2e-3  # 10 steps of 1e-4

    def test_a_gradient_scaler_takes_them(self, dtype: torch.dtype):
        """In float16: "Attempting to unscale FP16 gradients"."""
        model, state = trained_in_full(dtype)
        optimizer = torch.optim.SGD(rosa_func.parameters(state), 1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        before = loss_of(model, state, token_ids(4, 8))
        scaler.scale(before).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        assert loss_of(model, state, token_ids(4, 8)) < before

    def test_a_merge_rounds_them_once_and_a_resample_not_at_all(self, dtype: torch.dtype):
        model, state = trained_in_full(dtype)
        merged = rosa_func.merge(state)
        assert {W.dtype for W in merged.values()} == {dtype}
        resampled = rosa_func.resample(state, 1)
        full = list(state["model_dtype"].keys())
        assert full
        for name in full:
            leaf = state["trainable", name]
            assert leaf.dtype == torch.float32
            assert torch.equal(merged[name], leaf.to(dtype))
            assert torch.equal(resampled["trainable", name], leaf)
        start = rosa_func.merge(rosa_func.init(model, 2, train=["wte", "*ln_*"]))
        assert all(torch.equal(start[name], model.get_parameter(name)) for name in full)

    def test_nothing_of_them_is_kept_twice(self, dtype: torch.dtype):
        model, state = trained_in_full(dtype)
        assert all(like.shape == () for like in state["model_dtype"].values())
        assert not state["frozen"].keys() & state["model_dtype"].keys()
        counted = rosa_func.count(state)
        assert counted.total == sum(p.numel() for p in model.parameters())
        assert counted.trainable == sum(leaf.numel() for leaf in leaves(state).values())

    def test_all_that_is_made_of_a_state_has_the_dtypes_of_the_model(
        self, dtype: torch.dtype, tmp_path: Any
    ):
        model, state = trained_in_full(dtype)
        merged = rosa_func.merge(state)
        module = rosa_func.export.to_module(model, state)
        assert all(torch.equal(p, merged[name]) for name, p in module.named_parameters())
        change = rosa_func.checkpoint.delta(state, model)
        assert change["full"].keys() == state["model_dtype"].keys()
        changed = rosa_func.checkpoint.apply_delta(model, change)
        assert all(torch.equal(t, merged[name]) for name, t in change["full"].items())
        assert all(torch.equal(changed[name], merged[name]) for name in change["full"].keys())
        assert {W.dtype for W in changed.values()} == {dtype}
        rosa_func.export.to_peft(tmp_path, model, state)
        again = rosa_func.export.from_peft(model, tmp_path)
        for name, tensor in change["full"].items():
            assert torch.equal(again["trainable", name], tensor.float())
        assert again["model_dtype"].keys() == state["model_dtype"].keys()

    def test_a_saved_state_goes_on_with_the_same_bits(self, dtype: torch.dtype, tmp_path: Any):
        model, state = trained_in_full(dtype)
        rosa_func.checkpoint.save(tmp_path / "state.safetensors", state)
        loaded, _ = rosa_func.checkpoint.load(tmp_path / "state.safetensors")
        module = RosaModule(model, rosa_func.init(model, 2, train=["wte", "*ln_*"]))
        module.load_state_dict(RosaModule(model, state).state_dict())
        digest, ids = rosa_func.checkpoint.digest, token_ids(4, 8)
        expected = rosa_func.call(model, state, ids).logits
        mapped = TensorDict.load_memmap(state.memmap(str(tmp_path / "mapped")).saved_path)
        for other in (loaded, module.state, state.clone(), mapped):
            assert digest(other) == digest(state)
            assert torch.equal(rosa_func.call(model, other, ids).logits, expected)
        module.resample(1)
        assert digest(module.state) == digest(rosa_func.resample(state, 1))

    def test_a_gradient_by_torch_func_is_that_of_the_master(self, dtype: torch.dtype):
        model, state = trained_in_full(dtype)
        ids = token_ids(4, 8)
        found = grad(lambda t: loss_of(model, state.replace(trainable=t), ids))(state["trainable"])
        parameters = rosa_func.named_parameters(state)
        loss_of(model, state, ids).backward()
        for name in state["model_dtype"].keys():
            assert found[name].dtype == torch.float32
            # Some ten layers round to 16 bits, not all in the same order.
            expected = parameters[name].grad
            assert relative_distance(found[name], expected) <= 10 * torch.finfo(dtype).eps

    def test_a_compiler_casts_them(self, dtype: torch.dtype):
        torch.compiler.reset()
        model = seeded(lambda: nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))).to(dtype)
        state, x = perturbed(rosa_func.init(model, 2, train="1")), randn(3, 6).to(dtype)
        compiled = torch.compile(rosa_func.call, fullgraph=True, backend="eager")
        expected = rosa_func.call(model, state, x)
        # Before torch 2.11 the weight is formed: rounded once more.
        error = relative_distance(compiled(model, state, x), expected)
        assert error <= 4 * torch.finfo(dtype).eps

    def test_a_state_that_is_cast_as_a_whole_stays_of_one_piece(self, dtype: torch.dtype):
        model = gpt2_with_usual_weights().to(dtype)
        state = rosa_func.init(model, 2, train=["wte", "*ln_*"], exact=False)
        merged = rosa_func.merge(state.to(torch.float32))
        assert {W.dtype for W in merged.values()} == {torch.float32}
