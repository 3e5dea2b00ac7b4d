"""Small modules that use their weights in other ways than one product or one lookup."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map


class BilinearOfOneInput(nn.Bilinear):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x.flip(0))


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class LSTMOutputs(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


class TiedEmbedding(nn.Module):
    """An embedding that is the output projection too, as in GPT-2."""

    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6, padding_idx=padding_idx)
        self.project = nn.Linear(6, 9, bias=False)
        self.project.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.project(torch.tanh(self.embed(ids)))


class ReadsItsWeight(nn.Linear):
    """What custom modules do with a weight: slices, einsum, norms, and keyword arguments."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight / self.weight.norm(dim=1, keepdim=True)
        y = torch.einsum("oi,...i->...o", w, x) + F.linear(x, weight=self.weight, bias=self.bias)
        return y * self.weight[:, 0] + x @ self.weight.transpose(dim0=0, dim1=1)


class Experts(nn.Module):
    """A stack of matrices in one weight, used by matmul, as in a mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class ExpertsInALoop(nn.Module):
    """A batch of (out, in) matrices, each taken by its index, as stock mixtures of experts do."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([F.linear(x[e], self.weight[e]) for e in range(len(x))])


class ExpertsInOneProduct(nn.Module):
    """A batch of (in, out) matrices, multiplied at once."""

    is_transposed = True  # by which transformers says so

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight)


class Coded(Tensor):
    """A tensor made of two others, W = codes * scale, as quantised weights are."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> "Coded":
        made = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)
        made.codes, made.scale = codes, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].codes, args[0].scale)
        args = tree_map(lambda t: t.codes * t.scale if isinstance(t, Coded) else t, args)
        return func(*args, **(kwargs or {}))


class LeavesItsSum(nn.Linear):
    """A layer that leaves what it computed in an attribute, as some leave a loss."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.sum = y.sum()
        return y
