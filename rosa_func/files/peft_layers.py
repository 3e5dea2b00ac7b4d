"""How peft holds the factors of a weight: a layer's (`target_modules`) or any other's.

`target_parameters` names parameters, such as that of all experts of a layer. Both are converted to
A: m x r and B: r x n in the layout of the weight, and back.
"""

import math
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rosa_func._torch import Convolution
from rosa_func.modules import is_conv1d

Factors = tuple[Tensor, Tensor]


def has_layer(module: nn.Module, last: str) -> bool:
    """Return whether peft has a layer for the parameter of that name of the module."""
    # peft ignores subclasses of nn.Linear, and looks up rows itself where it adapts an embedding.
    is_embedding = getattr(type(module), "forward", None) is nn.Embedding.forward
    return last == "weight" and (is_embedding or is_conv1d(module) or type(module) is nn.Linear)


def of_layer(module: nn.Module, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """Return A B as the layer of the module holds it, by the ends of names."""
    if isinstance(module, nn.Embedding):
        return {"lora_embedding_A": A.T, "lora_embedding_B": B.T}
    if is_conv1d(module):
        return {"lora_A.weight": A.T, "lora_B.weight": B.T}
    return {"lora_A.weight": B, "lora_B.weight": A}


def from_layer(module: nn.Module, lora_A: Tensor, lora_B: Tensor) -> Factors:
    """Return the factors of the change of the weight of a layer, unscaled."""
    if isinstance(module, nn.Embedding) or is_conv1d(module):
        return lora_A.T, lora_B.T
    return lora_B, lora_A


def why_no_parameter(module: nn.Module, W: Tensor) -> str | None:
    """Say why peft cannot adapt such a parameter of a module, or None if it can.

    It changes the parameter while the module computes. So the module has to be called, and not
    only read from, as torch's own attention reads the weights of its parts.
    """
    of_torch = type(module).__module__.startswith("torch.")
    if isinstance(module, Convolution) or (of_torch and type(module) is not nn.Linear):
        return f"belongs to {type(module).__name__}, which peft does not adapt"
    if type(module).forward is nn.Module.forward:
        return f"belongs to {type(module).__name__}, which peft cannot wrap: it has no forward"
    if W.ndim > 3:
        return f"has {W.ndim} dimensions, and peft adapts matrices and batches of matrices"
    if W.ndim == 3 and len(W) == 1 and _is_transposed(module):
        return "is a batch of one matrix of (in, out), whose shape peft gets wrong"
    return None


def of_parameter(module: nn.Module, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """Return A B as peft holds it for a parameter of the module, by the ends of names.

    Of a batch of E matrices:

        lora_A: (E r) x in, matrix by matrix;    lora_B: out x (r E), matrices innermost
    """
    if A.ndim == 3:
        if _is_transposed(module):
            A, B = B.mT, A.mT
        r = A.shape[-1]
        A, B = A.permute(1, 2, 0).reshape(-1, r * len(A)), B.reshape(len(B) * r, -1)
    return {"lora_A.weight": B, "lora_B.weight": A}


def from_parameter(module: nn.Module, lora_A: Tensor, lora_B: Tensor, r: int, ndim: int) -> Factors:
    """Return the factors of the change of a parameter of that many dimensions, unscaled."""
    if ndim != 3:
        return lora_B, lora_A
    A = lora_B.reshape(len(lora_B), r, -1).permute(2, 0, 1)
    B = lora_A.reshape(-1, r, lora_A.shape[1])
    return (B.mT, A.mT) if _is_transposed(module) else (A, B)


def wrapped(model: nn.Module, targets: Collection[str]) -> dict[str, str]:
    """Return which parameter peft adapts at which place: {place: name}.

    It wraps a module once for each of its parameters, the last one outermost, and matches the
    ends of names.
    """
    found = {}
    for name, module in model.named_modules() if targets else ():
        own = [f"{name}.{last}" for last, _ in module.named_parameters(recurse=False)]
        chosen = [p for p in own if name and any(f".{p}".endswith(f".{t}") for t in targets)]
        for depth, parameter in enumerate(reversed(chosen)):
            found[name + ".base_layer" * depth] = parameter
    return found


def padded(A: Tensor, B: Tensor, r: int) -> Factors:
    """Return factors of rank r with the same product."""
    missing = r - A.shape[-1]
    return F.pad(A, (0, missing)), F.pad(B, (0, 0, 0, missing))


def scaled(A: Tensor, B: Tensor, scale: float) -> Factors:
    """Return factors of scale A B, of a rank that A B can have, without what `padded` adds."""
    used = A.flatten(0, -2).any(0) | B.movedim(-2, 0).flatten(1).any(1)
    used[0] |= not used.any()
    root = math.sqrt(abs(scale))
    A, B = A[..., used] * root, B[..., used, :] * math.copysign(root, scale)
    if A.shape[-1] <= min(A.shape[-2], B.shape[-1]):
        return A, B
    U, S, Vh = torch.linalg.svd(A @ B, full_matrices=False)  # more columns than a rank can be
    return U * S.sqrt().unsqueeze(-2), S.sqrt().unsqueeze(-1) * Vh


def _is_transposed(module: nn.Module) -> bool:
    """Return whether a batch is of (in, out) matrices, as peft asks it."""
    return bool(getattr(module, "is_transposed", False))
