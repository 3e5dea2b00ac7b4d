"""LoRA is the special case: the weight stays as it is, and training is that of a plain LoRA."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import rosa_func
from models import randn, seeded
from rosa_func import samplers
from rosa_func.exact import SUPPORTED
from test_state import BUILD, LAYOUTS, SEEDS, SIZES, adapt, layer

# {layout: (the input of a layer whose weight is m x n, what a LoRA adds to its output)}
PLAIN: dict[
    str, tuple[Callable[[int, int], Tensor], Callable[[Tensor, Tensor, Tensor], Tensor]]
] = {
    "linear": (lambda m, n: randn(5, n), lambda x, A, B: (x @ B.T) @ A.T),
    "conv1d": (lambda m, n: randn(5, m), lambda x, A, B: (x @ A) @ B),
    "embedding": (lambda m, n: torch.tensor([0, 1, 0, m - 1]), lambda x, A, B: A[x] @ B),
    "conv2d": (
        lambda m, n: randn(2, n, 3, 4),
        lambda x, A, B: F.conv2d(F.conv2d(x, B.view(len(B), -1, 1, 2)), A.view(*A.shape, 1, 1)),
    ),
}


@given(LAYOUTS, SIZES, SIZES, st.sampled_from(SUPPORTED), st.data(), SEEDS)
def test_the_residual_is_the_weight_and_its_storage(layout, m, n, dtype, data, seed):
    module = layer(layout, m, n, dtype, seed)
    r = data.draw(st.integers(1, min(m, n)))
    state = adapt(module, r, sampler=samplers.lora, key=seed)
    assert torch.equal(state["frozen", "weight"], module.weight)
    assert state["frozen", "weight"].data_ptr() == module.weight.data_ptr()


@pytest.mark.parametrize("layout", PLAIN)
@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=str
)
@given(SIZES, SIZES, st.data(), SEEDS)
def test_training_is_that_of_a_plain_lora(layout, dtype, relative, m, n, data, seed):
    inputs, added = PLAIN[layout]
    module, x = seeded(lambda: BUILD[layout](m, n), seed).to(dtype), inputs(m, n)
    x = x.to(dtype) if x.is_floating_point() else x
    r = data.draw(st.integers(1, min(m, n)))
    state = adapt(module, r, sampler=samplers.lora, key=seed)
    leaves = rosa_func.parameters(state)
    A, B = (leaf.detach().clone().requires_grad_() for leaf in leaves)
    optimizers = [torch.optim.SGD(group, 0.1) for group in (leaves, [A, B])]
    for _ in range(3):
        outputs = rosa_func.call(module, state, x), module(x).detach() + added(x, A, B)
        for optimizer, y in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            (y - 1).square().mean().backward()
        scale = torch.stack(
            [plain.grad.norm() for plain in (A, B)]
        ).max()  # one of them starts at 0
        for ours, plain in zip(leaves, (A, B), strict=True):
            assert (ours.grad - plain.grad).norm() <= relative * scale
        for optimizer in optimizers:
            optimizer.step()
    assert all(leaf.any() for leaf in leaves)
    W = module.weight.detach().flatten(1)
    off = rosa_func.merge(state)["weight"].flatten(1) - (W + A @ B).detach()
    assert off.norm() <= relative * W.norm()
