"""What the tests compare with: weights formed in full, distances, and snapshots bit for bit."""

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from rosa_func.weight import Weight


def main_output(result: Any) -> Tensor:
    """Return a result that is a tensor, or the logits or hidden states of a transformers output."""
    return result if isinstance(result, Tensor) else result[0]


def dense_weights(state: TensorDict) -> dict[str, Tensor]:
    """Form every weight R + A B with no code of the library; autograd goes through it.

    With a sparse part and the toys, scale * (codes * scales + A B + S); past products as A B.
    """
    weights = dict(state["frozen"].items())
    for name, value in state["trainable"].items():
        if isinstance(value, Tensor):
            like = state.get("model_dtype", {}).get(name, value)
            weights[name] = value.to(like.dtype)
            continue
        R, entries = weights[name], dict(value.items())
        W = R if isinstance(R, Tensor) else dequantised(dict(R.items()))
        W = W + (entries["A"] @ entries["B"]).to(W.dtype).view(W.shape)
        if "past_A" in state.get("fixed", {}).get(name, {}).keys():
            past = state["fixed", name]
            W = W + (past["past_A"] @ past["past_B"]).to(W.dtype).view(W.shape)
        if "values" in entries:
            values = entries["values"].to(W.dtype)
            support = state["fixed", name, "support"].long()
            matrices = torch.zeros_like(W).view(*values.shape[:-1], -1)
            W = W + matrices.scatter(-1, support, values).view(W.shape)
        if "scale" in entries:
            scale = entries["scale"].to(W.dtype)
            W = W * scale.view(*scale.shape, *(1 for _ in W.shape[scale.ndim :]))
        weights[name] = W
    return weights


# Dettmers et al. 2023, "QLoRA", appendix E, in float32.
NF4_LEVELS = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
]


def dynamic_levels() -> np.ndarray:
    """Return the levels of the scales of scales: 64, 32, ... 1 a decade, down from [0.1, 1]."""
    levels = [np.float32(0), np.float32(1)]
    for decade in range(7):
        steps = torch.linspace(0.1, 1, 2**decade + 1).numpy()  # as torch rounds them
        middles = (steps[1:] + steps[:-1]) / np.float32(2) * np.float32(10.0 ** (decade - 6))
        levels += [*middles, *-middles]
    return np.sort(np.array(levels, np.float32))


def dequantised(fields: dict[str, Tensor]) -> Tensor:
    """Return the residual of a base that is not dense."""
    if "codes" in fields:  # of the toy
        return fields["codes"].to(fields["scales"].dtype) * fields["scales"]
    like = fields["like"]
    shape = [size for size in like.shape if size]
    scales = fields["scales"].numpy()
    if "offset" in fields:
        nested = np.repeat(fields["nested_scales"].numpy(), 256, -1)[..., : scales.shape[-1]]
        scales = dynamic_levels()[scales] * nested + fields["offset"].numpy()
    if "int8" in fields:
        values = fields["int8"].numpy().astype(np.float32)
    else:
        pairs = fields["nf4"].numpy()
        halves = np.stack([pairs // 16, pairs % 16], -1).reshape(*pairs.shape[:-1], -1)
        values = np.array(NF4_LEVELS, np.float32)[halves]
    values = values * np.repeat(scales, 64, -1).astype(np.float32)
    size = int(np.prod(shape) / np.prod(values.shape[:-1]))
    return torch.from_numpy(np.ascontiguousarray(values[..., :size])).view(shape).to(like.dtype)


def perturbed(state: TensorDict, scale: float = 0.1, seed: int = 0) -> TensorDict:
    """Move the trainable leaves a little, as training would. A B is then no longer a part of W."""
    generator = torch.Generator().manual_seed(seed)

    def move(leaf: Tensor) -> Tensor:
        noise = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
        return leaf.detach() + scale * noise

    return state.replace(trainable=state["trainable"].apply(move))


def widened(value: Any) -> Any:
    """Return a tensor or a state in float64, its integers as they are."""
    if isinstance(value, TensorDict):
        return value.apply(widened)
    return value.double() if value.is_floating_point() else value


def relative_distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference relative to the largest value of b."""
    return float((a - b).detach().abs().max() / b.detach().abs().max().clamp_min(1e-30))


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor of any dtype."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def model_snapshot(model: nn.Module) -> dict[str, Any]:
    """Return everything about a model that a function must leave as it was."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {
        "tensors": {
            name: (id(t), t.data_ptr(), t._version, t.requires_grad, t.grad, tensor_bytes(t))
            for name, t in tensors
        },
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            (name, attribute): list(hooks)
            for name, module in model.named_modules()
            for attribute, hooks in vars(module).items()
            if attribute.endswith("_hooks")
        },
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
    }


def state_bytes(state: TensorDict) -> dict[Any, tuple[bool, bytes]]:
    """Return every tensor of a state by its path, byte for byte, and whether it takes gradients."""
    return {
        path: (tensor.requires_grad, tensor_bytes(tensor))
        for path, tensor in state.items(include_nested=True, leaves_only=True)
    }


def global_state() -> tuple[Any, ...]:
    """Return the global state that must not change: generators, threads and torch's flags."""
    generators = (
        tensor_bytes(torch.get_rng_state()),
        random.getstate(),
        str(np.random.get_state()),
    )
    flags = (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype())
    return generators + flags


def storage_pointers(tensors: Iterable[Tensor]) -> set[int]:
    """Return the addresses of the storages that hold the tensors' values."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def tied_names(model: nn.Module) -> list[list[str]]:
    """Group the names by the parameter they stand for."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return sorted(groups.values())


def residual(w: Weight) -> Tensor:
    """Return R with what rounding took from it, in float64."""
    R = w.base.dense()
    if w.lost is None or not w.lost.numel():
        return R.double()
    return of_codes(R, w.lost) if w.lost.dtype == torch.int8 else R.double() + w.lost.double()


def of_codes(R: Tensor, codes: Tensor) -> Tensor:
    """Return the numbers that lie codes / 256 of the way from R to the next one, in float64.

    The next one is that away from zero for codes above 0, and that towards zero for others. As
    integers, the numbers of one sign follow each other.
    """
    away = codes.sign().to(torch.int16)
    next_one = (R.view(torch.int16) + away).view(R.dtype).double()
    before = (R.view(torch.int16) - away).view(R.dtype).double()
    step = torch.where(next_one.isfinite(), next_one - R.double(), R.double() - before)
    return R.double() + codes.double().abs() / 256 * step
