"""What the laws run over. To test one more sampler, layout or use of a weight, add a line here.

Names in the plural are lists, for `pytest.mark.parametrize`; ANY_... are Hypothesis strategies that
draw from them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import rosa_func
from models import randn, seeded
from modules import (
    BilinearOfOneInput,
    Experts,
    LSTMOutputs,
    ReadsItsWeight,
    SelfAttention,
    TiedEmbedding,
)
from rosa_func import samplers
from rosa_func.weight.rounding import SUPPORTED

# Samplers.

SAMPLERS: list[samplers.Sampler] = [
    samplers.random,
    samplers.top,
    samplers.bottom,
    samplers.projection,
    samplers.lora,
    samplers.additive,
]
SAMPLER_NAMES = [sampler.__name__ for sampler in SAMPLERS]
ZERO_PRODUCT_SAMPLERS = [samplers.lora, samplers.additive]  # A B = 0, so R is W itself
SAMPLERS_WITHOUT_A_DRAW = [samplers.top, samplers.bottom]  # W alone decides
SAMPLERS_THAT_DRAW = [s for s in SAMPLERS if s not in SAMPLERS_WITHOUT_A_DRAW]
ANY_SAMPLER = st.sampled_from(SAMPLERS)

# Dtypes: all that a weight may have.

DTYPES = list(SUPPORTED)
SIXTEEN_BIT_DTYPES = [dtype for dtype in DTYPES if torch.finfo(dtype).bits == 16]
WIDE_DTYPES = [dtype for dtype in DTYPES if torch.finfo(dtype).bits > 16]
ANY_DTYPE = st.sampled_from(DTYPES)
ANY_16_BIT_DTYPE = st.sampled_from(SIXTEEN_BIT_DTYPES)
ANY_WIDE_DTYPE = st.sampled_from(WIDE_DTYPES)

# Sizes and seeds.

SIZES = st.integers(2, 9)  # of either side of a weight
SEEDS = st.integers(0, 2**20)


# Layouts: how a layer stores its weight.


class Layout(NamedTuple):
    """A type of layer with one weight, and what a LoRA does to it.

    Attributes:
        name: how the layer is called in the tests' ids.
        build: makes a layer from (m, n). Its weight is m x n; in a convolution, m x n x kernel.
        input_dim: the dimension of the weight that meets the layer's input.
        example: makes a float32 or integer input of that layer from (m, n, seed).
        added: what a LoRA with factors A and B adds to the output for an input x: (x, A, B).
    """

    name: str
    build: Callable[[int, int], nn.Module]
    input_dim: int
    example: Callable[[int, int, int], Tensor]
    added: Callable[[Tensor, Tensor, Tensor], Tensor]

    def input(self, m: int, n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
        """Make an input of a layer whose weight has this dtype."""
        x = self.example(m, n, seed)
        return x.to(dtype) if x.is_floating_point() else x

    def __repr__(self) -> str:
        return self.name


LINEAR = Layout(
    "linear",
    build=lambda m, n: nn.Linear(n, m),
    input_dim=1,
    example=lambda m, n, seed: randn(5, n, seed=seed),
    added=lambda x, A, B: (x @ B.T) @ A.T,
)
CONV1D = Layout(
    "conv1d",
    build=lambda m, n: Conv1D(n, m),
    input_dim=0,
    example=lambda m, n, seed: randn(5, m, seed=seed),
    added=lambda x, A, B: (x @ A) @ B,
)
EMBEDDING = Layout(
    "embedding",
    build=lambda m, n: nn.Embedding(m, n),
    input_dim=1,
    example=lambda m, n, seed: torch.tensor([0, 1, 0, m - 1]),
    added=lambda x, A, B: A[x] @ B,
)
CONV2D = Layout(
    "conv2d",
    build=lambda m, n: nn.Conv2d(n, m, (1, 2)),
    input_dim=1,
    example=lambda m, n, seed: randn(2, n, 3, 4, seed=seed),
    added=lambda x, A, B: F.conv2d(F.conv2d(x, B.view(len(B), -1, 1, 2)), A.view(*A.shape, 1, 1)),
)
LAYOUTS = [LINEAR, CONV1D, EMBEDDING, CONV2D]
ANY_LAYOUT = st.sampled_from(LAYOUTS)


def scattered_matrix(m: int, n: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Draw a matrix with magnitudes from 1e-3 to 1e3 side by side, and some zeros."""
    exponents = 6 * torch.rand(m, n, generator=torch.Generator().manual_seed(seed)) - 3
    W = randn(m, n, seed=seed, dtype=torch.float64) * 10 ** exponents.double()
    return torch.where(exponents > -2.9, W, 0).to(dtype)


def scattered_layer(layout: Layout, m: int, n: int, dtype: torch.dtype, seed: int) -> nn.Module:
    """Build one layer whose weight is a scattered matrix."""
    module: nn.Module = seeded(lambda: layout.build(m, n)).to(dtype)
    weight = scattered_matrix(*module.weight.flatten(1).shape, dtype, seed)
    module.load_state_dict({"weight": weight.view_as(module.weight)}, strict=False)
    return module


def adapt_every_weight(module: nn.Module, r: int, **options: object) -> TensorDict:
    """Return a state in which all weights are adapted, also those that are not by default."""
    return rosa_func.init(module, r, targets="*weight", **options)


# Uses of a weight in a forward pass.


class WeightUse(NamedTuple):
    """A module that uses its weights in some way, and an input of it.

    Attributes:
        name: how it is called in the tests' ids.
        build: makes the module.
        input: a float32 or integer input.
        targets: the weights that are adapted.
        gradient_is_derivative: False where torch, by design, gives other gradients.
    """

    name: str
    build: Callable[[], nn.Module]
    input: Tensor
    targets: str | list[str] = "weight"
    gradient_is_derivative: bool = True

    def __repr__(self) -> str:
        return self.name


_IDS = torch.tensor([[1, 0, 8, 3], [2, 2, 1, 5]])


WEIGHT_USES = [
    WeightUse("linear", lambda: nn.Linear(6, 5), randn(2, 3, 6)),
    WeightUse("linear without bias", lambda: nn.Linear(5, 6, bias=False), randn(4, 5)),
    WeightUse("linear on a vector", lambda: nn.Linear(6, 5), randn(6)),
    WeightUse("Conv1D", lambda: Conv1D(5, 6), randn(2, 3, 6)),
    WeightUse("embedding", lambda: nn.Embedding(9, 6), _IDS),
    WeightUse(
        "embedding with padding",
        lambda: nn.Embedding(9, 6, padding_idx=1),
        _IDS,
        gradient_is_derivative=False,
    ),
    WeightUse(
        "embedding with padding from the end",
        lambda: nn.Embedding(9, 6, padding_idx=-1),
        _IDS,
        gradient_is_derivative=False,
    ),
    WeightUse(
        "embedding scaled by frequency",
        lambda: nn.Embedding(9, 6, scale_grad_by_freq=True),
        _IDS,
        gradient_is_derivative=False,
    ),
    WeightUse("embedding bag", lambda: nn.EmbeddingBag(9, 6), _IDS),
    WeightUse("tied", TiedEmbedding, _IDS, "embed"),
    WeightUse("tied with padding", lambda: TiedEmbedding(1), _IDS, "embed", False),
    WeightUse("conv1d", lambda: nn.Conv1d(4, 6, 3), randn(2, 4, 7)),
    WeightUse("conv2d", lambda: nn.Conv2d(4, 6, 3), randn(1, 4, 4, 4)),
    WeightUse(
        "conv2d strided",
        lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, bias=False),
        randn(1, 4, 6, 6),
    ),
    WeightUse("conv2d same", lambda: nn.Conv2d(4, 6, (3, 1), padding="same"), randn(1, 4, 4, 4)),
    WeightUse(
        "conv2d circular",
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        randn(1, 4, 4, 4),
    ),
    WeightUse("conv2d in groups", lambda: nn.Conv2d(4, 6, 3, groups=2), randn(1, 4, 4, 4)),
    WeightUse("conv3d", lambda: nn.Conv3d(2, 4, 2), randn(1, 2, 3, 3, 3)),
    WeightUse("transposed conv2d", lambda: nn.ConvTranspose2d(4, 6, 3), randn(1, 4, 4, 4)),
    WeightUse(
        "attention",
        lambda: SelfAttention(8, 2, batch_first=True),
        randn(2, 3, 8),
        ["in_proj_weight", "out_proj"],
    ),
    WeightUse("bilinear", lambda: BilinearOfOneInput(4, 4, 5), randn(3, 4)),
    WeightUse("lstm", lambda: LSTMOutputs(4, 5), randn(3, 2, 4), "weight_*"),
    WeightUse("reads its weight", lambda: ReadsItsWeight(6, 5), randn(3, 6)),
    WeightUse("experts", Experts, randn(3, 2, 6)),
]
