"""What the processes of a group do together: where one fails or is gone, each has an error."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from rosa_func._torch import is_wrapper
from rosa_func.files import nested

Group = Any  # dist.ProcessGroup | None; builds of torch without distributed do not have the class
Result = TypeVar("Result")


@contextmanager
def waiting(what: str, group: Group) -> Iterator[None]:
    """Say of an exchange inside that fails what it was for, and what may have happened."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"could not {what} on rank {dist.get_rank(group)}: another process is gone, or did not "
            f"answer within the timeout of the group, init_process_group(timeout=...) ({error})"
        ) from error


def all_told(work: Callable[[], Result], what: str, group: Group) -> list[Result]:
    """Return what `work` returns in each process, by rank.

    Where it fails in one, that one raises its error, and the others one that quotes it: none waits.
    What is returned is pickled, by torch, on its way.
    """
    failure: Exception | None = None
    own: tuple[Result | None, str]
    try:
        own = work(), ""
    except Exception as error:  # raised below, once the others know of it
        failure, own = error, (None, f"{type(error).__name__}: {error}")
    told: list[Any] = [None] * dist.get_world_size(group)
    with waiting(what, group):
        dist.all_gather_object(told, own, group)
    if failure:
        raise failure
    for rank, (_, said) in enumerate(told):
        if said:
            raise RuntimeError(
                f"rank {rank} could not {what} ({said}); this is rank {dist.get_rank(group)}"
            )
    return [value for value, _ in told]


def refuse_different(facts: Callable[[], Mapping[str, Any]], what: str, group: Group) -> None:
    """Raise a ValueError in every process where a fact is not the same in all of them."""
    told = all_told(facts, what, group)
    for name in dict.fromkeys(name for each in told for name in each):
        for rank, each in enumerate(told):
            if name not in each or each[name] != told[0].get(name):
                raise ValueError(
                    f"could not {what}: rank 0 has {name} {told[0].get(name)}, and rank {rank} has "
                    f"{each.get(name)}; pass the same in every process (distributed.check_equal "
                    "compares states)"
                )


def broadcast(tensor: Tensor, source: int, what: str, group: Group) -> None:
    """Send the tensor of the process of that rank in the group to the others, into theirs."""
    if tensor.numel():
        with waiting(what, group):
            dist.broadcast(tensor, global_rank(source, group), group)


def global_rank(rank: int, group: Group) -> int:
    """Return the rank among all processes of that one of the group."""
    return rank if group is None else dist.get_global_rank(group, rank)


def description(tensor: Tensor) -> str:
    """Return the dtype and shape of a tensor, and a hash of its bytes.

    Of a sharded tensor each process has other bytes.
    """
    kind = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
    if is_wrapper(tensor):
        return kind
    return f"{kind} #{nested.digest({}, {'': tensor})[:16]}"
