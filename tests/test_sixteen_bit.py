"""16-bit models with float32 factors: what dtype is formed where, and what it costs in accuracy."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rosa_func
from cases import SIXTEEN_BIT_DTYPES
from models import seeded, tiny_gpt2, token_ids
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
