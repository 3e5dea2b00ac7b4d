"""What fine-tuning changed, as factors of the smallest rank."""

from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from rosa_func import exact as arithmetic
from rosa_func import layout, targets
from rosa_func import state as states
from rosa_func.compose import check_fit, compose
from rosa_func.parallel import map_weights


class _Change(NamedTuple):
    A: Tensor
    B: Tensor
    error: Tensor


def delta(
    state: TensorDict, model: nn.Module, *, tol: float = 1e-7, rank: int | None = None
) -> TensorDict:
    """Return the change of each weight as a product of the smallest rank.

        W - W0 = A B + E,    |E| <= tol |W|  (Frobenius),    W0 of the model

    W is what `merge` returns, before it is rounded to 16 bits; the rounding of A and B to float32
    comes on top of tol, and is in the `error` that is returned.

    A change after K cycles of rank r has rank 2 r K at most: a few MB to keep or send where the
    merged model has hundreds. A float32 residual is rounded at every resample, in all directions:
    after about 100 cycles that alone is 1e-7 of |W|, and takes a high rank. Then raise tol, give
    `rank`, or train with `exact=True`, where nothing is lost.

    Args:
        state: a state of `init` or `resample`, trained or not.
        model: the model as `init` was given it.
        tol: the largest error of a weight, relative to the weight.
        rank: a rank for all, in place of tol; never more than min(m, n).

    Returns:
        A TensorDict with the entries `change` {name: {A: m x k, B: k x n}}, `full`
        {name: tensor} of the tensors trained in full, and `error` {name: |E| / |W|, float64}.
        `checkpoint.save` takes it as it takes a state.

    Raises:
        KeyError: if the model and the state have different names (named).
        ValueError: if shapes differ, tol is negative, a rank is not positive, or the model is a
            skeleton.

    Source: Eckart and Young 1936.

    Example:
        >>> import rosa_func, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(60, 40))
        >>> state = rosa_func.init(model, 2)
        >>> state["trainable", "0.weight", "A"] += 1e-2
        >>> change = rosa_func.checkpoint.delta(state, model)
        >>> change["change", "0.weight", "A"].shape
        torch.Size([40, 1])
    """
    if not tol >= 0:
        raise ValueError(f"tol is a relative error of at least 0, got {tol!r}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank is None or a positive int, got {rank!r}")
    targets.refuse_meta(model)
    check_fit(model, compose(state))
    pretrained = targets.tensors(model)
    adapted = layout.check(state)

    def work(name: str) -> _Change:
        W = arithmetic.join(*layout.parts(state, name)).double()
        W0 = pretrained[name].flatten(1).to(W)
        return _factored(W, W - W0, tol, rank, arithmetic.factor_dtype(pretrained[name].dtype))

    changes = dict(zip(adapted, map_weights(work, adapted), strict=True))
    factors = {name: {"A": change.A, "B": change.B} for name, change in changes.items()}
    rest = states.merge(state)
    full = {
        name: rest[name].clone()
        for name, tensor in pretrained.items()
        if name not in changes and not torch.equal(rest[name], tensor)
    }
    errors = {name: change.error for name, change in changes.items()}
    entries: dict[str, dict[str, Any]] = {"change": factors, "full": full, "error": errors}
    return TensorDict({part: TensorDict(value) for part, value in entries.items()})


def apply_delta(model: nn.Module, delta: TensorDict) -> dict[str, Tensor]:
    """Return the dense weights of the changed model, as `merge` returned them up to the error.

        W = W0 + A B

    Args:
        model: the model that the delta was made with; it is not written to.
        delta: of `delta`.

    Returns:
        {name: tensor} in the model's dtypes, for `load_state_dict` (`strict=False` where weights
        are tied). Tensors that did not change share their storage with the model.

    Raises:
        KeyError: if the delta lacks a part, or has a name that the model has not.
        ValueError: if a shape differs (both are named).

    Example:
        >>> import rosa_func, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(60, 40))
        >>> state = rosa_func.init(model, 2)
        >>> state["trainable", "0.weight", "A"] += 1e-2
        >>> change = rosa_func.checkpoint.delta(state, model)
        >>> weights = rosa_func.checkpoint.apply_delta(model, change)
        >>> torch.allclose(weights["0.weight"], rosa_func.merge(state)["0.weight"], atol=1e-7)
        True
    """
    if missing := {"change", "full"} - set(delta.keys()):
        raise KeyError(f"the delta has no entry {min(missing)!r}; it has {sorted(delta.keys())}")
    targets.refuse_meta(model)
    weights = targets.tensors(model)
    changed = {}
    for name, value in delta["change"].items():
        A, B = value["A"], value["B"]
        _check_shape(model, weights, name, (A.shape[0], B.shape[1]), matrix=True)
        W = weights[name]
        wide = torch.addmm(W.flatten(1).to(A.dtype), A.to(W.device), B.to(W.device))
        changed[name] = wide.to(W.dtype).view(W.shape)
    for name, tensor in delta["full"].items():
        _check_shape(model, weights, name, tuple(tensor.shape), matrix=False)
        changed[name] = tensor.to(weights[name])
    return weights | changed


def _factored(W: Tensor, D: Tensor, tol: float, rank: int | None, dtype: torch.dtype) -> _Change:
    """Return D = A B + E with as few columns in A as the tolerance allows, or `rank` of them."""
    tall = D if D.shape[0] <= D.shape[1] else D.T
    # Eigenvectors of the Gram matrix are singular vectors; what each of them carries is measured
    # on D itself, since small eigenvalues are too inexact to be judged by.
    _, U = torch.linalg.eigh(tall @ tall.T)
    U = U.flip(1)
    carried = U.T @ tall
    energy = carried.square().sum(1)
    order = energy.argsort(descending=True, stable=True)
    U, carried, energy = U[:, order], carried[order], energy[order]
    left = energy.flip(0).cumsum(0).flip(0)  # what is lost with k kept, for k = 0, 1, ...
    k = int((left > (tol * W.norm()).square()).sum()) if rank is None else min(rank, len(energy))
    A, B = U[:, :k], carried[:k]
    size = B.norm(dim=1).sqrt()
    scale = torch.where(size > 0, size, 1.0)
    A, B = A * scale, B / scale[:, None]
    if tall is not D:
        A, B = B.T, A.T
    A, B, norm = A.to(dtype).contiguous(), B.to(dtype).contiguous(), W.norm()
    error = (D - A.double() @ B.double()).norm() / torch.where(norm > 0, norm, 1.0)
    return _Change(A, B, error)


def _check_shape(
    model: nn.Module, weights: dict[str, Tensor], name: str, shape: tuple[int, ...], *, matrix: bool
) -> None:
    if name not in weights:
        raise KeyError(
            f"the delta changes {name}, which {type(model).__name__} has not; "
            "was it made with this model?"
        )
    W = weights[name]
    expected = tuple(W.flatten(1).shape if matrix else W.shape)
    if shape != expected:
        raise ValueError(
            f"the delta changes {name} of shape {shape}, and {type(model).__name__} has it "
            f"of shape {expected}"
        )
