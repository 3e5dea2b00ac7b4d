"""No value is read on the host: on a GPU that would wait for all that was asked of it before.

On the meta device tensors have shapes and no values, and to read one is an error.
"""

from typing import Any

import pytest
from tensordict import TensorDict
from torch import nn

import rosa_func
from cases import WEIGHT_USES, WeightUse, with_sparse
from models import seeded
from references import main_output
from rosa_func.weight.layout import leaves

KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "quantised": {"quantize": "nf4_double", "master": True},
}


def train_without_values(module: nn.Module, use: WeightUse, state: TensorDict) -> None:
    state = state.to("meta")
    rosa_func.parameters(state)
    skeleton = rosa_func.skeleton(module).to("meta")
    main_output(rosa_func.call(skeleton, state, use.input.to("meta"))).sum().backward()
    for leaf in leaves(state).values():
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape


@pytest.mark.filterwarnings("ignore:.*forms a batch of")  # bilinear
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use", WEIGHT_USES, ids=repr)
def test_a_call_and_its_backward_pass_read_no_value(use: WeightUse, kind: str):
    module = seeded(use.build)
    state = rosa_func.init(module, 1, targets=use.targets, **KINDS[kind])
    train_without_values(module, use, state)


# How many entries of S the rows of an embedding have is counted, and read.
NOT_OF_ROWS = [use for use in WEIGHT_USES if use.input.is_floating_point() or "bag" in use.name]


@pytest.mark.filterwarnings("ignore:.*forms a batch of")
@pytest.mark.parametrize("use", NOT_OF_ROWS, ids=repr)
def test_nor_do_they_with_a_sparse_part(use: WeightUse):
    module = seeded(use.build)
    state = with_sparse(rosa_func.init(module, 1, targets=use.targets), 0.5)
    train_without_values(module, use, state)
