"""Donation: the parts of a weight that is drawn again take the memory of the old ones.

Weight by weight, in the workers that draw: a new part is made as always, and then copied into the
memory of the old part, so the bits are those of the pure function. What trains is not touched:
optimizers need the old factors to carry their moments to the new ones.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rosa_func._torch import address, is_alias
from rosa_func.weight.parallel import map_weights, uninterrupted
from rosa_func.weight.parts import Weight, remade, tensors
from rosa_func.weight.rounding import join
from rosa_func.weight.spent import Spent, restore, spend


class Handover(NamedTuple):
    """What becomes of the old parts when there are new ones.

    Attributes:
        weight: (name, old, new) -> the new weight, in the memory of the old one where it fits.
        leaf: (name, old) -> the tensor that goes on in the place of one that is trained in full.
    """

    weight: Callable[[str, Weight, Weight], Weight]
    leaf: Callable[[str, Tensor], Tensor]


# As pure functions do: the old parts stay what they are.
APART = Handover(lambda name, old, new: new, lambda name, old: old.detach().clone())


@contextmanager
def handing_over(taker: str) -> Iterator[Handover]:
    """Yield a handover that spends what it took, unless there is an exception inside.

    Then all that was taken is given back: the old tensors have the values of the new ones, as many
    of them as there are, so each weight is the old or the new one. A worker is never interrupted,
    so none is half of each.
    """
    taken: list[_Taken] = []

    def weight(name: str, old: Weight, new: Weight) -> Weight:
        if old.is_closed():  # drawn beside: the base stays what it is
            return new._replace(base=old.base)
        base = remade(new.base, map(into, _stored(old), _stored(new)))
        new = new._replace(base=base)
        if old.lost is not None and new.lost is not None:
            new = new._replace(lost=into(old.lost, new.lost))
        taken.extend(_Taken(name, *pair) for pair in zip(_all(old), _all(new), strict=True))
        return new

    def leaf(name: str, old: Tensor) -> Tensor:
        taken.append(_Taken(name, old, old.detach()))
        return taken[-1].new

    def give_back() -> None:
        for _, old, new in taken:
            if old is not new:
                restore(old, new)
                spend(new, _NOT_ENDED)

    try:
        yield Handover(weight, leaf)
        for name, old, new in taken:
            if old is not new and is_alias(old, new):
                spend(old, f"{name} was donated to {taker}: {_INSTEAD}")
    except BaseException:
        uninterrupted(give_back)
        raise


class _Taken(NamedTuple):
    """A tensor of the weight of that name, and the one that goes on in its place."""

    name: str
    old: Tensor
    new: Tensor


_INSTEAD = "its memory holds other values now; use the state that was returned"
# Of what nobody was given; a traceback may have it still.
_NOT_ENDED = "this tensor was that of a state that was not made: there was an exception"
_CALL = (
    "rosa_func.call(model, state, ...) computes with its state, and rosa_func.skeleton(model) is a "
    "model without weights, to be moved, copied or kept"
)


Take = Callable[[Tensor, Weight], Weight]


@contextmanager
def emptying(model: Mapping[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], Take]]:
    """Yield what a state may have of a model's tensors, and spend these at the end.

    After an exception the weights that were taken are merged back into the memory of W.

    Args:
        model: the tensors of a model by name.

    Yields:
        The tensors that take their place; and (W, new) -> the new weight, in the memory of W where
        it fits.
    """
    own = {name: tensor.detach() for name, tensor in model.items()}
    taken: list[tuple[Tensor, Weight]] = []

    def take(W: Tensor, new: Weight) -> Weight:
        fields = list(_stored(new))
        for place, field in enumerate(fields):
            if _fits(W, field):
                fields[place] = into(W, field)
                new = new._replace(base=remade(new.base, fields))
                taken.append((W, new))
                break
        return new

    def merge_back(pair: tuple[Tensor, Weight]) -> None:
        W, new = pair
        W.copy_(join(new))
        for field in _stored(new):
            spend(field, _NOT_ENDED)

    def give_back() -> None:
        map_weights(merge_back, taken)
        for name, tensor in model.items():
            if type(tensor) is Spent:
                restore(tensor, own[name])
        for tensor in own.values():
            if address(tensor):
                spend(tensor, _NOT_ENDED)

    try:
        yield own, take
        for name, tensor in model.items():
            if address(tensor):
                spend(tensor, f"{name} of this model was donated to init: {_CALL}")
                tensor.grad = None
    except BaseException:
        uninterrupted(give_back)
        raise


def into(old: Tensor, new: Tensor) -> Tensor:
    """Return the new tensor, copied into the memory of the old one if that is of its kind."""
    if not _fits(old, new):
        return new
    if new.data_ptr() != old.data_ptr():
        with torch.no_grad():
            old.copy_(new)
    return old.detach()


def _fits(old: Tensor, new: Tensor) -> bool:
    """Return whether a tensor can be copied into another without a trace.

    Not into one whose memory is mapped from a file, which would be written to.
    """
    if type(old) not in (Tensor, nn.Parameter) or not old.numel() or old.shape != new.shape:
        return False
    kinds = [(t.dtype, t.device, t.stride(), t.is_inference()) for t in (old, new)]
    return kinds[0] == kinds[1]


def _stored(w: Weight) -> tuple[Tensor, ...]:
    return tuple(w.base)  # type: ignore[arg-type]


def _all(w: Weight) -> list[Tensor]:
    return tensors(w) if w.lost is None else [*tensors(w), w.lost]
