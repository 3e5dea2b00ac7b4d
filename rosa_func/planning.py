"""What training will need of memory, and a resample of time, before either is begun."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from rosa_func import keys, modules, samplers, targeting
from rosa_func._alive import Alive, Attention
from rosa_func._timing import resample_seconds
from rosa_func._torch import backward
from rosa_func.drawing import check_draw
from rosa_func.extras import needs
from rosa_func.forward import call
from rosa_func.patterns import Rank
from rosa_func.samplers import Sampler, Site
from rosa_func.starting import assembled, in_full
from rosa_func.storage import Master, Storage
from rosa_func.targeting import Targets
from rosa_func.trainable import parameters
from rosa_func.weight import Weight, read
from rosa_func.weight.gathering import has_rows, is_matrix, rows_each
from rosa_func.weight.keeping import Place
from rosa_func.weight.layout import entries, trains
from rosa_func.weight.low_rank import LowRank
from rosa_func.weight.rounding import factor_dtype

Loss = Callable[[nn.Module, TensorDict], Tensor]


class MemoryPlan(NamedTuple):
    """Bytes by what they are for, see `plan`; `str()` makes a table of them.

    Attributes:
        frozen: residuals, and the tensors that do not train; of several ranks, the share of one.
        compensation: what rounding took, where it is kept, shared as `frozen` is.
        gathered: two frozen weights, whole: the one in use and the next. 0 of one rank.
        trainable: factors, and what trains in full.
        gradients: of what trains.
        moments: what the optimizer holds.
        activations: the rest of what is held at the peak of a step; 0 without a step.
        peak: the most that is held at once.
        traffic: what a rank receives in a step: frozen weights, gathered in forward and again in
            backward, and gradients, averaged by a ring. Layers that are computed again are gathered
            a third time, which is not counted.
        resample: seconds of a resample on this machine with all its threads, by draws of smaller
            weights, each on one thread; divided among the ranks.
    """

    frozen: int
    compensation: int
    gathered: int
    trainable: int
    gradients: int
    moments: int
    activations: int
    peak: int
    traffic: int
    resample: float

    def __str__(self) -> str:
        """Make a table in MiB."""
        *names, last = self._fields
        width = max(map(len, names))
        rows = [
            f"{n:{width}} {size / 2**20:>12,.1f} MiB" for n, size in zip(names, self, strict=False)
        ]
        return "\n".join([*rows, f"{last:{width}} {self.resample:>12,.1f} s"])


def plan(
    model: Any,
    r: Rank | None = None,
    *,
    batch: tuple[int, int] | None = None,
    loss: Loss | None = None,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] = torch.optim.AdamW,
    dtype: torch.dtype | None = None,
    sampler: Sampler = samplers.random,
    targets: Targets = None,
    train: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    exact: bool | None = None,
    compensation: Place = None,
    quantize: str | None = None,
    master: Master = None,
    ranks: int = 1,
) -> MemoryPlan:
    """Return what a state and a training step need of memory, without any of it being taken.

    Two steps run on torch's meta device, where tensors have shapes and no values, and what is alive
    after each operation is counted. So it is what this library, the model's code and the optimizer
    do, not a formula. What a process needs beside its tensors (libraries, workspaces, memory that
    an allocator keeps) is not in it. Where the model's code asks for a value, it is told 1 (True).
    A step of models that switch autocast off themselves, as Llama does, needs torch 2.13.

    Args:
        model: an `nn.Module`, also on the meta device, or a transformers config whose
            `architectures` name a class.
        r: as in `init`, as are all options that are not named otherwise here.
        batch: rows and tokens of a batch for a transformers model with a language head; None for no
            step, unless `loss` is given.
        loss: in place of `batch`: (model, state) -> loss, with inputs on the meta device.
        optimizer: makes the optimizer from a list of the leaves.
        dtype: of the model's floating-point weights; None for its own.
        sampler: see `init`.
        targets: see `init`.
        train: see `init`.
        exclude: see `init`.
        exact: see `init`.
        compensation: see `init`; it is counted wherever it is kept.
        quantize: see `init`.
        master: see `init`; it is counted as compensation, wherever it is kept.
        ranks: among how many devices the frozen matrices and the compensation are sharded, each
            with a batch of its own. Vectors, and what trains, are whole on each.

    Returns:
        Bytes by kind, of one rank.

    Raises:
        ValueError: as `init`; if both `batch` and `loss` are given, or `ranks` is not positive.
        TypeError: as `init`; if `model` is neither.

    Example:
        >>> import rosa_func, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(1024, 1024, device="meta"))
        >>> def loss(model, state):
        ...     return rosa_func.call(model, state, torch.ones(8, 1024, device="meta")).sum()
        >>> needs = rosa_func.plan(model, 16, loss=loss)
        >>> needs.trainable, needs.moments  # A and B; two moments of each, and a count
        (131072, 262152)
    """
    if batch is not None and loss is not None:
        raise ValueError("batch and loss are two ways to say what a step computes: pass one")
    check_draw(0, sampler)
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
        raise ValueError(f"ranks is a positive int, got {ranks!r}")
    storage = Storage(exact, compensation, quantize, master).check()
    described = _on_meta(model, dtype)
    chosen = targeting.plan(described, r, targets, train, exclude)
    state = _described(described, chosen, sampler, storage)
    whole, own = _held(state, 1), _held(state, ranks)
    trained = sum(tensor.nbytes for path, tensor in entries(state).items() if trains(path))
    if batch is not None:
        loss = partial(_language_loss, batch)
    peak, gradients, moments = whole.all + trained, 0, 0
    if loss is not None:
        gradients = trained
        peak, moments = _stepped(described, state, loss, optimizer)
    rest = peak - whole.all - trained - gradients - moments
    gathered = 2 * max(own.matrices, default=0) if ranks > 1 else 0
    received = 2 * (sum(own.matrices) + trained)  # by rings: all but the rank's own share
    return MemoryPlan(
        frozen=own.frozen,
        compensation=own.lost,
        gathered=gathered,
        trainable=trained,
        gradients=gradients,
        moments=moments,
        activations=rest,
        peak=own.all + gathered + trained + gradients + moments + rest,
        traffic=received * (ranks - 1) // ranks,
        resample=resample_seconds(described, chosen, sampler) / ranks,
    )


class _Held(NamedTuple):
    """Bytes of what does not train on one rank, and of each matrix of it on all of them."""

    frozen: int
    lost: int
    matrices: list[int]

    @property
    def all(self) -> int:
        return self.frozen + self.lost


def _held(state: TensorDict, ranks: int) -> _Held:
    """Return what a rank holds where frozen matrices and the compensation are sharded."""
    frozen = sum(t.nbytes for path, t in entries(state).items() if not trains(path))
    matrices, lost = [], 0
    for value in read(state).frozen.values():
        stored: Any = value.base if isinstance(value, Weight) else (value,)
        if isinstance(value, Weight) or is_matrix(value):
            matrices.append(sum(tensor.nbytes for tensor in stored))
            frozen -= sum(tensor.nbytes - _share(tensor, ranks) for tensor in stored)
        if isinstance(value, Weight) and value.lost is not None:
            frozen -= value.lost.nbytes
            lost += _share(value.lost, ranks)
    return _Held(frozen, lost, matrices)


def _share(tensor: Tensor, ranks: int) -> int:
    """Return the bytes of the first rank's rows; one row alone is whole everywhere."""
    is_spread = has_rows(tensor.shape)
    return tensor[: rows_each(len(tensor), ranks)].nbytes if is_spread else tensor.nbytes


def _stepped(
    model: nn.Module,
    state: TensorDict,
    loss: Loss,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
) -> tuple[int, int]:
    """Take two steps; return the most bytes alive at once, and those of the optimizer."""
    leaves = parameters(state)
    trained = optimizer(leaves)
    with Attention(), Alive(entries(state).values()) as alive:
        for _ in range(2):  # in the first there are no moments yet
            trained.zero_grad()
            backward(loss(model, state))
            trained.step()
    slots = [value for slots in trained.state.values() for value in slots.values()]
    return alive.peak, sum(value.nbytes for value in slots if isinstance(value, Tensor))


def _language_loss(batch: tuple[int, int], model: nn.Module, state: TensorDict) -> Tensor:
    ids = torch.zeros(batch, dtype=torch.long, device="meta")
    result: Tensor = call(model, state, ids, labels=ids, use_cache=False).loss
    return result


def _on_meta(model: Any, dtype: torch.dtype | None) -> nn.Module:
    """Return the model, or the one that a config describes, on the meta device, in training."""
    if not isinstance(model, nn.Module):
        model = _from_config(model)
    modules.refuse_int8(model)
    moved = {name: tensor.to("meta") for name, tensor in modules.tensors(model).items()}
    described = modules.with_tensors(model, moved).to("meta").train()
    return described if dtype is None else described.to(dtype)


def _from_config(config: Any) -> nn.Module:
    if not hasattr(config, "architectures"):
        raise TypeError(
            "plan takes an nn.Module or a transformers config, got "
            f"{type(config).__name__}; AutoConfig.from_pretrained(name) reads one"
        )
    with needs("trainer"):
        import transformers

    kind: Any = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if kind is None:
            kind = transformers.AutoModelForCausalLM
            model: nn.Module = kind.from_config(config)
        else:
            model = kind._from_config(config)
    return model


def _described(
    model: nn.Module,
    plan: targeting.Plan,
    sampler: Sampler,
    storage: Storage,
) -> TensorDict:
    """Return the state that `init` would make, on the meta device."""
    weights = modules.tensors(model)
    is_split = _takes_something(sampler)

    def adapted(name: str) -> Weight:
        W, (r, input_dim) = weights[name], plan.adapted[name]
        kept, wide = storage.kept(W), factor_dtype(W.dtype)
        lead = W.shape[:-2] if input_dim < 0 else ()
        m, n = (W if input_dim < 0 else W.flatten(1)).shape[-2:]
        A, B = (W.new_empty(*lead, *size, dtype=wide) for size in ((m, r), (r, n)))
        base, lost = storage.like(W, batch=input_dim < 0).store(W.to(wide) if is_split else W)
        if kept is not None:
            size = W.shape if lost is not None or is_split else torch.Size([0])
            lost = W.new_empty(size, dtype=kept.dtype)
        return Weight(
            base, (LowRank(A, B),), torch.tensor(input_dim), None if kept is None else lost
        )

    full, dtypes = in_full(plan, weights.__getitem__, copy=True)
    split = {name: adapted(name) for name in plan.adapted}
    return assembled(plan, weights.__getitem__, split, full, dtypes)


def _takes_something(sampler: Sampler) -> bool:
    """Return whether a sampler's product is not zero, so that R is not W."""
    A, B = sampler(torch.eye(2), 1, Site("weight", 1, keys.generator(0, "plan", "")))
    return bool(A.any() and B.any())
