"""What a sparse part does not keep and does not form, and weights of a real vocabulary."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rosa_func
from cases import CONV1D, LAYOUTS, LINEAR, adapt_every_weight, with_sparse
from models import randn
from references import relative_distance, storage_pointers
from rosa_func import sparse


class Made(TorchDispatchMode):
    """Notes the memory in which the results of operations lie, and how much that is."""

    def __init__(self, state: TensorDict) -> None:
        super().__init__()
        self.held = addresses(state)
        self.bytes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.layout is torch.strided:
            memory = result.untyped_storage()
            if memory.data_ptr() not in self.held:
                self.bytes[memory.data_ptr()] = memory.nbytes()
        return result


def addresses(state: TensorDict) -> set[int]:
    return storage_pointers(state.values(include_nested=True, leaves_only=True))


class TestMemory:
    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    def test_nothing_of_the_weights_size_is_saved_but_what_the_state_holds(self, layout):
        """Sparse tuners keep the dense weight of each layer, as experts and convolutions did."""
        m, n = 200, 300  # far more than the 5 tokens have of anything
        module = layout.build(m, n)
        state = with_sparse(adapt_every_weight(module, 2), 0.01)
        rosa_func.parameters(state)
        held = addresses(state)
        saved: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        x = layout.input(m, n, torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            rosa_func.call(module, state, x)
        assert saved
        own = [t.untyped_storage() for t in saved]
        sizes = [memory.nbytes() for memory in own if memory.data_ptr() not in held]
        assert max(sizes) < m * n  # of 4 m n bytes

    @pytest.mark.parametrize("layout", [LINEAR, CONV1D], ids=str)
    @pytest.mark.parametrize(("density", "dense"), [(0.01, 0), (0.4, 1)])
    def test_a_gradient_of_few_places_forms_no_dense_one(self, layout, density, dense):
        m, n = 200, 300
        module = layout.build(m, n)
        state = with_sparse(adapt_every_weight(module, 2), density)
        leaves = rosa_func.named_parameters(state)
        output = rosa_func.call(module, state, layout.input(m, n, torch.float32))
        sums = output.square().sum()
        with Made(state) as made:  # no gradient of x is asked for, so W is not formed again
            torch.autograd.grad(sums, [leaves["weight.values"]])
        assert sum(size >= 4 * m * n for size in made.bytes.values()) == dense

    def test_rows_of_an_embedding_come_from_the_values(self):
        m, n = 400, 30
        module = nn.Embedding(m, n)
        state = with_sparse(adapt_every_weight(module, 2), 0.02)
        leaves = rosa_func.parameters(state)
        with Made(state) as made:
            output = rosa_func.call(module, state, torch.tensor([0, 399, 5, 5]))
            torch.autograd.grad(output.square().sum(), leaves)
        assert max(made.bytes.values()) < m * n  # of 4 m n bytes


class TestLargeWeights:
    def test_a_vocabulary_of_50257(self):
        """Rows beyond 32,767 and places beyond 2^24, as lookup and as head."""
        m, n = 50257, 768
        module = nn.Embedding.from_pretrained(torch.zeros(m, n))
        state = rosa_func.init(module, 0, targets="weight")
        rows = torch.tensor([0, 32767, 32768, 40000, m - 1])
        support = (rows * n + torch.tensor([0, n - 1, 5, 300, n - 1])).flip(0)
        state = sparse.add(state, {"weight": support})
        assert state["fixed", "weight", "support"].dtype == torch.int32
        (values,) = (v for k, v in rosa_func.named_parameters(state).items() if "values" in k)
        (found,) = torch.autograd.grad(
            (rosa_func.call(module, state, rows) * torch.arange(n)).sum(), [values]
        )
        assert found.tolist() == [0, n - 1, 5, 300, n - 1]
        x, d = randn(3, n), randn(3, m, seed=1)
        W = rosa_func.compose(state)["weight"]
        (found,) = torch.autograd.grad(F.linear(x, W), [values], d)
        places = support.flip(0)
        expected = (d[:, places // n] * x[:, places % n]).sum(0)
        assert relative_distance(found, expected) <= 1e-6

    def test_columns_beyond_32767(self):
        m, n = 3, 40000
        module = nn.Linear(n, m, bias=False)
        places = torch.tensor([32767, 32768, 39999, 40000, n + 39999, 3 * n - 1])
        state = sparse.add(rosa_func.init(module, 0), {"weight": places})
        values = dict(rosa_func.named_parameters(state))["weight.values"]
        x, d = randn(2, n), randn(2, m, seed=1)
        (found,) = torch.autograd.grad(rosa_func.call(module, state, x), [values], d)
        expected = (d[:, places // n] * x[:, places % n]).sum(0)
        assert relative_distance(found, expected) <= 1e-6
