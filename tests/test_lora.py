"""With the sampler `lora` the weight stays as it is, and training is that of a plain LoRA."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rosa_func
from cases import ANY_DTYPE, ANY_LAYOUT, LAYOUTS, SEEDS, SIZES, adapt_every_weight, scattered_layer
from models import seeded
from rosa_func import samplers


@given(ANY_LAYOUT, SIZES, SIZES, ANY_DTYPE, st.data(), SEEDS)
def test_the_residual_of_lora_is_the_weight_in_its_own_storage(layout, m, n, dtype, data, seed):
    module = scattered_layer(layout, m, n, dtype, seed)
    r = data.draw(st.integers(1, min(m, n)))
    state = adapt_every_weight(module, r, sampler=samplers.lora, key=seed)
    assert torch.equal(state["frozen", "weight"], module.weight)
    assert state["frozen", "weight"].data_ptr() == module.weight.data_ptr()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=str
)
@given(SIZES, SIZES, st.data(), SEEDS)
def test_training_is_that_of_a_plain_lora(layout, dtype, relative, m, n, data, seed):
    module, x = seeded(lambda: layout.build(m, n), seed).to(dtype), layout.input(m, n, dtype)
    r = data.draw(st.integers(1, min(m, n)))
    state = adapt_every_weight(module, r, sampler=samplers.lora, key=seed)
    leaves = rosa_func.parameters(state)
    A, B = (leaf.detach().clone().requires_grad_() for leaf in leaves)
    optimizers = [torch.optim.SGD(group, 0.1) for group in (leaves, [A, B])]
    for _ in range(3):
        outputs = rosa_func.call(module, state, x), module(x).detach() + layout.added(x, A, B)
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
    W = module.weight.detach().flatten(1)
    off = rosa_func.merge(state)["weight"].flatten(1) - (W + A @ B).detach()
    assert off.norm() <= relative * W.norm()
