"""What the laws run over. To test one more sampler, layout, base, term or use, add a line here.

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
    ExpertsInALoop,
    ExpertsInOneProduct,
    LSTMOutputs,
    ReadsItsWeight,
    SelfAttention,
    TiedEmbedding,
)
from references import perturbed
from rosa_func import samplers, sparse
from rosa_func.weight import Base, Term, read, write
from rosa_func.weight.dense import Dense
from rosa_func.weight.keeping import Kept
from rosa_func.weight.low_rank import low_rank
from rosa_func.weight.quantised import QUANTISED
from rosa_func.weight.rounding import SUPPORTED, factor_dtype, join, split
from rosa_func.weight.sparse_part import SparsePart
from toys import Int8, Scale

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
        build: makes a layer from (m, n). Its weight is m x n; in a convolution, m x n x kernel; of
            experts, experts x m x n.
        input_dim: the dimension of the weight that meets the layer's input; negative in a batch.
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
EXPERTS_IN_A_LOOP = Layout(
    "experts in a loop",
    build=lambda m, n: ExpertsInALoop(m, n),
    input_dim=-1,
    example=lambda m, n, seed: randn(3, 4, n, seed=seed),
    added=lambda x, A, B: (x @ B.mT) @ A.mT,
)
EXPERTS_IN_ONE_PRODUCT = Layout(
    "experts in one product",
    build=lambda m, n: ExpertsInOneProduct(m, n),
    input_dim=-2,
    example=lambda m, n, seed: randn(3, 4, m, seed=seed),
    added=lambda x, A, B: (x @ A) @ B,
)
LAYOUTS = [LINEAR, CONV1D, EMBEDDING, CONV2D, EXPERTS_IN_A_LOOP, EXPERTS_IN_ONE_PRODUCT]
BATCHES = [layout for layout in LAYOUTS if layout.input_dim < 0]
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


def with_sparse(state: TensorDict, density: float, seed: int = 0) -> TensorDict:
    """Return the state with a sparse part on random places, as if trained."""
    support = sparse.support_random(state, density, seed)
    return perturbed(sparse.add(state, support), seed=seed)


# What a weight is made of, beside its low-rank term. A test of any but DENSE and () needs the toys:
# pytest.mark.usefixtures("toys").


def sparse_at_start(W: Tensor, batch: bool) -> SparsePart:
    """Return zeros at a quarter of the places of each matrix, chosen at random."""
    matrices = W.flatten(0, -3) if batch else W.unsqueeze(0)
    generator = torch.Generator().manual_seed(W.numel())
    chosen = [torch.randperm(M.numel(), generator=generator) for M in matrices]
    support = torch.stack([places[: 1 + len(places) // 4].sort().values for places in chosen])
    support = support.int().view(*(W.shape[:-2] if batch else ()), -1)
    return SparsePart(torch.zeros(support.shape, dtype=factor_dtype(W.dtype)), support)


BASES: dict[str, Callable[[Tensor, bool], Base]] = {  # of a weight, and whether it is a batch
    "dense": lambda W, batch: Dense(W),
    "int8": lambda W, batch: Int8.like(W),
    **{f"{name} in blocks": base.of for name, base in QUANTISED.items()},
}
QUANTISED_BASES = [name for name in BASES if name.endswith(" in blocks")]
TERMS: dict[str, tuple[Callable[[Tensor, bool], Term], ...]] = {
    "low rank": (),
    "scaled": (Scale.at_start,),
    "sparse": (sparse_at_start,),
    "scaled and sparse": (Scale.at_start, sparse_at_start),
}


class Parts(NamedTuple):
    """What the adapted weights of a state are made of.

    Attributes:
        base: of `BASES`.
        terms: of `TERMS`.
    """

    base: str = "dense"
    terms: str = "low rank"

    def put_into(self, state: TensorDict, exact: bool | None = None) -> TensorDict:
        """Make the weights of a state of `init` of these parts. The function stays the same.

        Except for what a base takes and no compensation keeps. `exact` is what `init` was given:
        an exact compensation of a base that takes many bits is in float64, see `Int8`. A quantised
        base has a master.
        """
        parts = read(state)
        weights = {}
        for name, w in parts.adapted().items():
            factors, base, lost, W = low_rank(w), w.base, w.lost, join(w)
            if self.base != "dense":
                kept = None if lost is None else Kept(torch.float64 if exact else w.base.dtype)
                if self.base in QUANTISED_BASES:
                    own = torch.float16 if kept is None else kept.dtype
                    kept = Kept(torch.promote_types(own, torch.float16))
                like = BASES[self.base](W.to(w.base.dtype), w.is_batch())
                base, lost = split(W, factors, like, kept)
            more = [at_start(W.to(w.base.dtype), w.is_batch()) for at_start in TERMS[self.terms]]
            weights[name] = w._replace(base=base, terms=(factors, *more), lost=lost)
        return write(parts.with_adapted(weights))

    def __str__(self) -> str:
        return f"{self.base}, {self.terms}"


ANY_PARTS = st.builds(Parts, st.sampled_from(list(BASES)), st.sampled_from(list(TERMS)))
# Of the quantised bases the one with most fields: the others differ from it in their codes alone,
# which test_blocks and test_quantised look at, and ANY_PARTS draws them all.
_APART = [base for base in BASES if base not in {"nf4 in blocks", "int8 in blocks"}]
ALL_PARTS = [Parts(base, terms) for base in _APART for terms in TERMS]


class Case(NamedTuple):
    """One layer with an adapted weight: a row of the table of all columns above."""

    layout: Layout
    parts: Parts
    dtype: torch.dtype
    sampler: samplers.Sampler
    m: int
    n: int
    r: int
    seed: int

    def module(self) -> nn.Module:
        """Build the layer; its weight is a scattered matrix."""
        return scattered_layer(self.layout, self.m, self.n, self.dtype, self.seed)

    def state(self, exact: bool | None = None) -> TensorDict:
        """Return the state of `init`, in which all of the weight's parts are at their start."""
        options = {"exact": exact, "sampler": self.sampler, "key": self.seed}
        return self.parts.put_into(adapt_every_weight(self.module(), self.r, **options), exact)

    def trained(self, exact: bool | None = None) -> TensorDict:
        """Return the state as if trained."""
        return perturbed(self.state(exact), seed=self.seed)

    def input(self, seed: int = 0) -> Tensor:
        """Make an input of the layer."""
        return self.layout.input(self.m, self.n, self.dtype, seed)


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    layouts: st.SearchStrategy[Layout] = ANY_LAYOUT,
    parts: st.SearchStrategy[Parts] = ANY_PARTS,
    dtypes: st.SearchStrategy[torch.dtype] = ANY_DTYPE,
    any_sampler: st.SearchStrategy[samplers.Sampler] = ANY_SAMPLER,
) -> Case:
    """Draw a row of the table."""
    m, n = draw(SIZES), draw(SIZES)
    return Case(
        draw(layouts),
        draw(parts),
        draw(dtypes),
        draw(any_sampler),
        m,
        n,
        draw(st.integers(1, min(m, n))),
        draw(SEEDS),
    )


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
    WeightUse("experts in a loop", lambda: ExpertsInALoop(5, 6), randn(3, 2, 6)),
    WeightUse("experts in one product", lambda: ExpertsInOneProduct(6, 5), randn(3, 2, 6)),
]
