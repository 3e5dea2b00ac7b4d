"""With the sampler `lora` the weight stays as it is, and training is that of a plain LoRA."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

import rosa_func
from cases import BASES, LAYOUTS, SEEDS, SIZES, Layout, Parts, adapt_every_weight, cases
from models import seeded
from rosa_func import samplers
from rosa_func.weight import read
from rosa_func.weight.rounding import factor_dtype

pytestmark = pytest.mark.usefixtures("toys")

LORA: Any = st.just(samplers.lora)


@settings(max_examples=30)
@given(cases(parts=st.just(Parts()), any_sampler=LORA))
def test_the_residual_of_lora_is_the_weight_in_its_own_storage(case):
    module = case.module()
    state = adapt_every_weight(module, case.r, sampler=samplers.lora, key=case.seed)
    assert torch.equal(state["frozen", "weight"], module.weight)
    assert state["frozen", "weight"].data_ptr() == module.weight.data_ptr()


@settings(max_examples=30)
@given(cases(any_sampler=LORA))
def test_the_residual_of_lora_is_the_weight_as_its_base_stores_it(case):
    base = read(case.state()).adapted()["weight"].base
    W = case.module().weight.detach()
    stored, _ = BASES[case.parts.base](W, case.layout.input_dim < 0).store(
        W.to(factor_dtype(case.dtype))
    )
    assert torch.equal(base.dense(), stored.dense())


@pytest.mark.filterwarnings("ignore:bmm forms a batch")  # of the toy base
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=str
)
@given(st.sampled_from(list(BASES)), SIZES, SIZES, st.data(), SEEDS)
def test_training_is_that_of_a_plain_lora(
    layout: Layout, dtype: torch.dtype, relative: float, base: str, m: int, n: int, data, seed: int
):
    """Over an int8 base it is that of a LoRA on the dequantised weight."""
    module: nn.Module = seeded(lambda: layout.build(m, n), seed).to(dtype)
    x = layout.input(m, n, dtype)
    r = data.draw(st.integers(1, min(m, n)))
    state = adapt_every_weight(module, r, sampler=samplers.lora, key=seed)
    state = Parts(base).put_into(state)
    W = read(state).adapted()["weight"].base.dense()
    leaves = rosa_func.parameters(state)
    A, B = (leaf.detach().clone().requires_grad_() for leaf in leaves)
    optimizers = [torch.optim.SGD(group, 0.1) for group in (leaves, [A, B])]
    for _ in range(3):
        own = functional_call(module, {"weight": W}, (x,)).detach() + layout.added(x, A, B)
        outputs = rosa_func.call(module, state, x), own
        for optimizer, y in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            (y - 1).square().mean().backward()
        # Against the larger gradient: at first one of the two is 0.
        scale = torch.stack([plain.grad.norm() for plain in (A, B)]).max()
        for ours, plain in zip(leaves, (A, B), strict=True):
            assert (ours.grad - plain.grad).norm() <= relative * scale
        for optimizer in optimizers:
            optimizer.step()
    assert all(leaf.any() for leaf in leaves)
    expected = W + (A @ B).detach().view(W.shape)
    assert (rosa_func.merge(state)["weight"] - expected).norm() <= relative * W.norm()
