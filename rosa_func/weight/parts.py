"""What a weight is made of: a frozen base and the terms that train.

A weight is a fold. It starts from its base, and each term maps W to W:

    W = term_k(... term_1(base)),    with one low-rank term: W = R + A B

Bases and terms are NamedTuples of tensors. The names of their fields are the names of their
entries in a state, so the kind of a part is read from its entries. A new kind is a new file
and a line in `layout.BASES` or `layout.TERMS`; no rule changes.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor


class Base(Protocol):
    """How the frozen residual R of a weight is stored. Optional members may be None."""

    @property
    def _fields(self) -> tuple[str, ...]: ...
    @property
    def shape(self) -> torch.Size:
        """Of the weight."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight, as the model computes with it."""

    @property
    def device(self) -> torch.device:
        """Of the weight."""

    @property
    def coarse(self) -> bool:
        """Whether storing takes more than rounding does; then `merge` leaves what it took out."""

    def dense(self) -> Tensor:
        """Return R, in the weight's shape and dtype."""

    def store(self, R: Tensor) -> "tuple[Base, Tensor | None]":
        """Store another R in this base's way: the base, and what storing took (None: nothing)."""

    @property
    def apply(self) -> Callable[[Tensor, bool, Tensor | None], Tensor] | None:
        """(x, flipped, bias) -> x R + bias, or x R^T + bias; None: `dense` is used."""

    @property
    def rows(self) -> Callable[[Tensor], Tensor] | None:
        """(indices) -> the rows R[indices]; None: `dense` is used."""

    @property
    def select(self) -> "Callable[[Any], Base] | None":
        """(index) -> the base of R[index]; None: `dense` is used."""


class Term(Protocol):
    """What trains in a weight. All but `check` and `fold` may be None."""

    @property
    def _fields(self) -> tuple[str, ...]: ...
    @property
    def fixed(self) -> frozenset[str]:
        """The fields that do not train."""

    @property
    def ndim(self) -> int | None:
        """Dimensions of the weights to which `apply` can be applied: 2, or more for a batch."""

    def check(self, shape: torch.Size) -> str | None:
        """Say what does not fit a weight of that shape, None if all does.

        It is asked at every call, by a compiler too: look at shapes, not at values.
        """

    def fold(self, W: Tensor) -> Tensor:
        """Return the weight with the term in it: W -> W, for a W of any floating dtype."""

    @property
    def restarted(self) -> "Callable[[], Term] | None":
        """() -> the term that changes nothing, for after a merge; None: a sampler draws it."""

    @property
    def product(self) -> Callable[[torch.Size], Tensor] | None:
        """(shape of W) -> what `fold` adds to W; None if the term is not additive."""

    @property
    def apply(self) -> Callable[[Tensor, bool, Tensor], Tensor] | None:
        """(x, flipped, out) -> out + x P, or out + x P^T, P being the product."""

    @property
    def apply_(self) -> Callable[[Tensor, bool, Tensor], Tensor | None] | None:
        """Do what `apply` does, written over `out`; return what `pull` is to be given."""

    @property
    def pull(self) -> Callable[..., tuple[Tensor | None, ...]] | None:
        """(x, d, kept, flipped, d_x, needs) -> the gradients of the fields.

        Adds its share to d_x, unless it is folded in.
        """

    @property
    def through(self) -> Callable[[Tensor, Tensor, bool], Tensor] | None:
        """(x, R, flipped) -> x (R + P), or x (R + P)^T; asked where `apply` is None.

        It is for a term that is added, and is cheaper folded into R than applied beside it.
        """

    @property
    def rows(self) -> Callable[[Callable[..., Tensor], Tensor, torch.Size], Tensor] | None:
        """(embedding, indices, shape of W) -> the rows of the product."""

    @property
    def convolve(self) -> Callable[..., Tensor] | None:
        """(convolution, x, shape, *options) -> the convolution with the product."""

    @property
    def grouped(self) -> Callable[[Callable[..., Tensor], Tensor, bool], Tensor] | None:
        """(product of groups, x, flipped) -> x P, or x P^T, each group with a matrix of its own."""

    @property
    def select(self) -> "Callable[[Any], Term] | None":
        """(index) -> the term of W[index], which is that of its fields at this index."""


class Weight(NamedTuple):
    """One adapted weight.

    Attributes:
        base: the frozen residual.
        terms: what trains, in the order in which it is folded in.
        input_dim: an integer tensor: the dimension that meets the layer's input, 0 or 1, or -2 or
            -1 in a batch of matrices.
        lost: what rounding took from the residual, where it is kept. It has no elements while
            nothing was lost; its dtype is the one in which a loss will be kept.
        flipped: whether this stands for the transpose (of the last two dimensions).
    """

    base: Base
    terms: tuple[Term, ...]
    input_dim: Tensor
    lost: Tensor | None = None
    flipped: bool = False

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight, not of its transpose."""
        return self.base.shape

    def is_closed(self) -> bool:
        """Return whether the base takes nothing in: storing is coarse, and its loss not kept."""
        return self.base.coarse and self.lost is None

    def is_batch(self) -> bool:
        """Return whether leading dimensions index matrices, each with factors of its own."""
        ndim = len(self.base.shape)
        return ndim > 2 and any(term.ndim == ndim for term in self.terms)


def dense(w: Weight) -> Tensor:
    """Return W, or its transpose where it is flipped, by differentiable operations."""
    W = w.base.dense()
    for term in w.terms:
        W = term.fold(W)
    return W.mT if w.flipped else W


def trainable(term: Term) -> dict[str, Tensor]:
    """Return the fields of a term that train."""
    return {field: getattr(term, field) for field in term._fields if field not in term.fixed}


def fixed(term: Term) -> dict[str, Tensor]:
    """Return the fields of a term that do not train."""
    return {field: getattr(term, field) for field in term._fields if field in term.fixed}


Part = TypeVar("Part")  # a base or a term


def mapped(part: Part, function: Callable[[Tensor], Tensor], fields: Iterable[str]) -> Part:
    """Return the part with a function applied to some of its fields."""
    given: Any = part
    changed = {field: function(getattr(given, field)) for field in fields}
    result: Part = given._replace(**changed)
    return result


def unbound(w: Weight) -> list[Weight]:
    """Return the weights of the matrices of a batch.

    The fields are taken apart at once, so that their gradients are put together at once.
    """
    each = [
        [type(term)._make(fields) for fields in zip(*(f.unbind(0) for f in term), strict=True)]  # type: ignore[attr-defined]
        for term in w.terms
    ]
    return [
        w._replace(base=w.base.select(place), terms=terms)  # type: ignore[misc]
        for place, terms in enumerate(zip(*each, strict=True))
    ]


def cast(term: Term, dtype: torch.dtype) -> Term:
    """Return the term with its values in that dtype; integers stay."""
    given: Any = term
    for value in given:
        if value.dtype != dtype:
            break
    else:
        return term  # the usual case
    others = [
        field
        for field, value in zip(term._fields, given, strict=True)
        if value.dtype != dtype and value.is_floating_point()
    ]
    return mapped(term, lambda field: field.to(dtype), others) if others else term


def remade(part: Part, values: Iterable[Tensor]) -> Part:
    """Return the part with other tensors in all of its fields."""
    given: Any = part
    result: Part = given._replace(**dict(zip(given._fields, values, strict=True)))
    return result


def tensors(w: Weight) -> list[Tensor]:
    """Return the tensors that a product with the weight reads; see `rebuilt`."""
    found = [*w.base]  # type: ignore[misc]
    for term in w.terms:
        found += [*term]  # type: ignore[misc]
    return found


def rebuilt(w: Weight, values: Iterable[Tensor]) -> Weight:
    """Return the weight with other tensors in the place of `tensors(w)`."""
    rest = iter(values)
    parts: tuple[Any, ...] = (w.base, *w.terms)
    base, *terms = (remade(part, [next(rest) for _ in part._fields]) for part in parts)
    return w._replace(base=base, terms=tuple(terms))


def pulled(
    compute: Callable[..., Tensor], values: Iterable[Tensor], needs: Iterable[bool], d: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of compute(*values) by what is needed of the values, in a backward.

    It is computed again: by the values as such where a second derivative is asked for.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        if not again:
            pairs = zip(values, needs, strict=True)
            values = [value.detach().requires_grad_(needed) for value, needed in pairs]
        values = list(values)
        out = compute(*values)
        trained = [value for value in values if value.requires_grad]
        found = iter(torch.autograd.grad(out, trained, d, create_graph=again))
    return tuple(next(found) if value.requires_grad else None for value in values)
