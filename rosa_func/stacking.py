"""Several states of one model as one: trained at once by vmap, or each row of a batch with its own.

A stacked state is a state whose tensors have one more dimension in front. What all of its members
hold alike, such as the weights of the model under LoRA, is in memory once: that dimension has the
stride 0 there. Copies (`.clone()`, `.to(device)`) lose this, so move the states before stacking.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from rosa_func import modules
from rosa_func._stacked import (
    from_entries,
    is_shared,
    joined,
    members_of,
    of_each,
    parts_of_one,
    refuse_unlike,
    with_factors,
    with_losses_of_one_shape,
    without_zeros,
)
from rosa_func.checkpoint import delta
from rosa_func.forward import check_fit
from rosa_func.weight import Term, Weight, layout, read, write
from rosa_func.weight.dense import Dense
from rosa_func.weight.layout import Path
from rosa_func.weight.low_rank import LowRank, low_rank
from rosa_func.weight.sparse_part import SparsePart


def stack(states: Iterable[TensorDict]) -> TensorDict:
    """Return the states as one, factors of smaller ranks filled up with zeros.

        A: members x m x r,    B: members x r x n,    r the largest rank of the weight

    The zeros change nothing, and get gradients of 0: an optimizer whose update of a zero gradient
    is zero (SGD, Adam, AdamW) leaves them at exactly 0. What does not train and is the same in all
    states is kept once, so stack states that share their residuals: of `samplers.lora` or
    `samplers.additive`, or put on the model's own weights by `rebase`. Other residuals are copied,
    one for each state.

    Args:
        states: of `init` or `resample`, all of one model and adapted alike; of any ranks.

    Returns:
        A state of batch size (members,), whose leaves require no gradient. `parameters`, `vmap`,
        `select` and `unstack` take it; to resample, unstack it.

    Raises:
        ValueError: if there are no states, one is stacked already, or shapes or dtypes differ in
            more than the ranks (named).
        KeyError: if a state has an entry that another lacks (named).

    Example:
        >>> import rosa_func, torch
        >>> from rosa_func import samplers, stacking
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> states = [rosa_func.init(model, r, sampler=samplers.lora) for r in (1, 3)]
        >>> stacked = stacking.stack(states)
        >>> stacked["trainable", "0.weight", "A"].shape
        torch.Size([2, 4, 3])
    """
    all_parts = [parts_of_one(state) for state in states]
    if not all_parts:
        raise ValueError("there are no states to stack")
    ranks: dict[str, int] = {}
    for parts in all_parts:
        for name, w in parts.adapted().items():
            ranks[name] = max(ranks.get(name, 0), low_rank(w).r)
    all_parts = with_losses_of_one_shape(all_parts)
    padded = [with_factors(parts, lambda n, f: f.padded(ranks[n])) for parts in all_parts]
    members = [layout.entries(write(parts)) for parts in padded]
    for place, member in enumerate(members):
        refuse_unlike(members[0], member, place)
    entries = {path: joined(path, [member[path] for member in members]) for path in members[0]}
    return from_entries(entries, len(members))


def unstack(stacked: TensorDict) -> list[TensorDict]:
    """Return the states of a stacked one, without what `stack` filled up.

        unstack(stack(states)) = states,    bit for bit

    The last components are left out as filled up where both factors are 0.

    Args:
        stacked: a state of `stack`, trained or not.

    Returns:
        A state for each member. What does not train is shared with the stacked state.

    Raises:
        ValueError: if the state is not stacked.

    Example:
        >>> import rosa_func, torch
        >>> from rosa_func import stacking
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> stacked = stacking.stack([rosa_func.init(model, r) for r in (1, 3)])
        >>> one, other = stacking.unstack(stacked)
        >>> one["trainable", "0.weight", "A"].shape
        torch.Size([4, 1])
    """
    members = members_of(stacked)
    each = stacked.detach()
    states = [read(each[place]) for place in range(members)]
    return [
        write(
            with_factors(without_zeros(parts), lambda _, factors: factors.trimmed())._replace(
                full={name: value.clone() for name, value in parts.full.items()}
            )
        )
        for parts in states
    ]


def select(stacked: TensorDict, rows: Sequence[int] | Tensor) -> TensorDict:
    """Return a stacked state of the members that rows ask for: each row of a batch has its own.

        select(stacked, rows)[i] = stacked[rows[i]]

    What all members share stays shared. Gradients go back to the stacked state, so that a batch
    with rows of several tasks trains the adapters of all of them.

    Args:
        stacked: a state of `stack`.
        rows: integers, a member for each row of the batch; a member may come several times.

    Returns:
        A stacked state of as many members as rows, for `vmap` over it and the batch.

    Raises:
        ValueError: if the state is not stacked, or rows are empty, not one-dimensional, or ask for
            a member that it does not have.
        TypeError: if rows are not integers.

    Example:
        >>> import rosa_func, torch
        >>> from rosa_func import samplers, stacking
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> states = [rosa_func.init(model, 2, key=key, sampler=samplers.lora) for key in (0, 1)]
        >>> chosen = stacking.select(stacking.stack(states), [1, 0, 1])
        >>> forward = stacking.vmap(lambda state, x: rosa_func.call(model, state, x))
        >>> forward(chosen, torch.ones(3, 6)).shape
        torch.Size([3, 4])
    """
    members = members_of(stacked)
    index = torch.as_tensor(rows)
    if index.ndim != 1 or not len(index):
        raise ValueError(
            f"rows are a list with a member for each row, got the shape {tuple(index.shape)}"
        )
    if index.is_floating_point() or index.dtype == torch.bool:
        raise TypeError(f"rows are integers, a member for each row, got {index.dtype}")
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= members:
        raise ValueError(
            f"rows ask for the member {low if low < 0 else high}, and there are {members}, "
            f"0 to {members - 1}"
        )

    def chosen(path: Path, tensor: Tensor) -> Tensor:
        if is_shared(path, tensor):
            return tensor[0].expand(len(index), *tensor.shape[1:])
        return tensor[index.to(tensor.device, torch.int64)]

    entries = layout.entries(stacked)
    return from_entries({path: chosen(path, t) for path, t in entries.items()}, len(index))


def vmap(
    function: Callable[..., Any], in_dims: Any = 0, out_dims: Any = 0, **options: Any
) -> Callable[..., Any]:
    """Return `torch.func.vmap` of a function whose first argument is a stacked state.

        vmap(function)(stacked, x)[i] = function(stacked[i], x[i])

    What the members share is passed unbatched, which `torch.func.vmap` cannot know: a product with
    the weights of the model is one product for all members.

    Args:
        function: (state, ...) -> tensors, such as a loss by `call`.
        in_dims: as of torch's vmap; 0 for the state. (0, None): each member has the same input.
        out_dims: as of torch's vmap.
        options: of torch's vmap: `randomness`, `chunk_size`.

    Returns:
        (stacked, ...) -> tensors with a dimension of members.

    Raises:
        ValueError: when called, if the state is not stacked, or an argument does not have a row
            for each member.

    Example:
        >>> import rosa_func, torch
        >>> from rosa_func import samplers, stacking
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> states = [rosa_func.init(model, 2, key=key, sampler=samplers.lora) for key in (0, 1)]
        >>> stacked, x = stacking.stack(states), torch.ones(3, 6)
        >>> forward = stacking.vmap(lambda s, x: rosa_func.call(model, s, x), in_dims=(0, None))
        >>> forward(stacked, x).shape
        torch.Size([2, 3, 4])
    """

    def of_stacked(stacked: TensorDict, *args: Any) -> Any:
        members = members_of(stacked)
        dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * (1 + len(args))
        if dims[0] != 0:
            raise ValueError(f"in_dims is 0 for the stacked state, got {in_dims!r}")
        for place, (arg, dim) in enumerate(zip(args, dims[1:], strict=False), 1):
            rows = arg.shape[dim] if isinstance(arg, Tensor) and isinstance(dim, int) else members
            if rows != members:
                raise ValueError(
                    f"argument {place} has {rows} rows, and the state {members} members: "
                    "stacking.select(stacked, rows) gives each row its own, and in_dims None "
                    "gives all of them the same argument"
                )
        entries = layout.entries(stacked)
        shared = {path: t[0] for path, t in entries.items() if is_shared(path, t)}
        own = {path: t for path, t in entries.items() if path not in shared}

        def of_one(own: dict[Path, Tensor], *args: Any) -> Any:
            return function(layout.from_entries(shared | own), *args)

        return torch.func.vmap(of_one, dims, out_dims, **options)(own, *args)

    return of_stacked


def rebase(
    state: TensorDict, model: nn.Module, *, tol: float = 1e-7, rank: int | None = None
) -> TensorDict:
    """Return the same function on the model's own weights, so that other draws share them.

        R' = W0,    A' B' = W - W0,    W0 of the model

    A' B' is the change of `checkpoint.delta`: after K cycles of rank r it has rank 2 r K at most.
    It trains on, but in other factors than the state did.

    Args:
        state: a state of `init` or `resample`, trained or not.
        model: the model as `init` was given it; its weights are shared, not copied.
        tol: as in `checkpoint.delta`.
        rank: as in `checkpoint.delta`.

    Returns:
        A state that computes what the given one does, up to tol.

    Raises:
        KeyError, ValueError: as `checkpoint.delta`.

    Example:
        >>> import rosa_func, torch
        >>> from rosa_func import stacking
        >>> model = torch.nn.Sequential(torch.nn.Linear(60, 40))
        >>> state = rosa_func.init(model, 2)
        >>> state["trainable", "0.weight", "A"] += 1e-2
        >>> new = stacking.rebase(state, model)
        >>> torch.equal(new["frozen", "0.weight"], model[0].weight)
        True
        >>> x = torch.ones(3, 60)
        >>> torch.allclose(*(rosa_func.call(model, s, x) for s in (state, new)), atol=1e-5)
        True
    """
    change = delta(state, model, tol=tol, rank=rank)
    names = check_fit(model, state)
    pretrained = {names[name]: tensor for name, tensor in modules.tensors(model).items()}
    parts = read(state)

    def based(name: str, w: Weight) -> Weight:
        terms: list[Term] = [LowRank(*(change["change", name, side] for side in ("A", "B")))]
        if name in change.get("sparse", {}):
            terms.append(SparsePart(**dict(change["sparse", name].items())))
        lost = None if w.lost is None else w.lost.new_empty(0)  # nothing is lost of W0
        return Weight(Dense(pretrained[name].detach()), tuple(terms), w.input_dim, lost)

    full = {name: value.detach().clone() for name, value in parts.full.items()}
    return write(of_each(parts, based)._replace(full=full))
