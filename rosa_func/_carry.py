"""What an optimizer knows of the factors of a weight, carried to other factors."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rosa_func._slots import COUNTS, FACTORED, FIRST, SECOND, Slots, are_moments, check_slots, fresh
from rosa_func.weight import Term, Weight
from rosa_func.weight.low_rank import LowRank, low_rank
from rosa_func.weight.parts import trainable
from rosa_func.weight.sparse_part import SparsePart


def carry(
    optimizer: torch.optim.Optimizer,
    name: str,
    old: Weight,
    new: Weight,
    slots: Mapping[str, Slots],
    moments: str,
    fraction: float,
) -> dict[str, Slots]:
    """Return what an optimizer is to know of the leaves of a weight that was drawn again."""
    after: dict[str, Slots] = {}
    for term, drawn in zip(_training(old), _training(new), strict=True):
        pairs = {
            f"{name}.{field}": (leaf, getattr(drawn, field))
            for field, leaf in trainable(term).items()
        }
        if all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs.values()):
            continue
        own = {leaf: slots[leaf] for leaf in pairs}
        if _goes_on(term, drawn) and all(map(are_moments, own.values())):
            continue
        for leaf, (tensor, _) in pairs.items():
            check_slots(optimizer, leaf, tensor, own[leaf], moments)
        if moments == "reset":
            after |= {leaf: fresh(optimizer, *pair) for leaf, pair in pairs.items()}
        elif moments == "project" and isinstance(term, LowRank):
            after |= project(name, term, low_rank(new), own)
        else:
            after |= hand_on(pairs, own, fraction)
    return after


def _training(w: Weight) -> list[Term]:
    """Return the terms of which something trains."""
    return [term for term in w.terms if trainable(term)]


def _goes_on(old: Term, new: Term) -> bool:
    """Return whether the gradient of a term is what it was before the merge.

    That of a sparse part is the weight's, at the same places.
    """
    if not isinstance(old, SparsePart) or not isinstance(new, SparsePart):
        return False
    return torch.equal(old.support, new.support)


def hand_on(
    pairs: dict[str, tuple[Tensor, Tensor]], before: dict[str, Slots], fraction: float
) -> dict[str, Slots]:
    """Return the moments as they are, but for the smallest `fraction` of each, set to zero."""
    after = {}
    for name, slots in before.items():
        old, new = (tuple(leaf.shape) for leaf in pairs[name])
        if old != new:
            raise ValueError(
                f"{name} went from shape {old} to {new}: "
                "only moments='reset' and 'project' follow a rank that changes"
            )
        after[name] = {
            slot: _pruned(value, fraction)
            if fraction and isinstance(value, Tensor) and value.ndim
            else value
            for slot, value in slots.items()
        }
    return after


def project(name: str, old: LowRank, new: LowRank, before: dict[str, Slots]) -> dict[str, Slots]:
    """Return the moments of a weight's new factors, by way of the moment of its gradient."""
    of_A, of_B = before[f"{name}.A"], before[f"{name}.B"]
    eps = torch.finfo(old.A.dtype).eps
    A, B, new_A, new_B = (factor.detach().double() for factor in (*old, *new))
    pair = _Pair(A, B, of_A, of_B)
    after = (_projected if A.ndim == 2 else _of_each_matrix)(pair, new_A, new_B, eps)
    return dict(zip(before, after, strict=True))


class _Pair(NamedTuple):
    """The two factors of a product, and what the optimizer knows of each."""

    A: Tensor
    B: Tensor
    of_A: Slots
    of_B: Slots

    def transposed(self) -> "_Pair":
        """Return the pair of the transposed product: B^T is to A^T what A is to B."""
        return _Pair(self.B.mT, self.A.mT, _transposed(self.of_B), _transposed(self.of_A))


def _projected(old: _Pair, A: Tensor, B: Tensor, eps: float) -> tuple[Slots, Slots]:
    first: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for slot in FIRST:
        M_A, M_B = old.of_A.get(slot), old.of_B.get(slot)
        if M_A is not None or M_B is not None:
            left, right = gradient_moment(old.A, old.B, M_A, M_B, eps)
            first[0][slot], first[1][slot] = left @ (right @ B.mT), (A.mT @ left) @ right
    flipped = old.transposed()
    of_A = _of_left_factor(old.of_A, first[0], old.B, B)
    of_B = _of_left_factor(flipped.of_A, _transposed(first[1]), flipped.B, A.mT)
    return of_A, _transposed(of_B)


def _of_left_factor(
    slots: Slots, first: dict[str, Tensor], partner: Tensor, new_partner: Tensor
) -> Slots:
    """Return what is to be known of A', given its first moments, for the factors B and B'."""
    values = {slot: value for slot, value in first.items() if slots.get(slot) is not None}
    floor = values["exp_avg"].square() if "exp_avg" in values else partner.new_zeros(())
    for slot, v in _second_moments(slots).items():
        values[slot] = torch.maximum(_rescaled(v, partner, new_partner), floor)
    if "variance" in values:
        v = values.pop("variance")
        values["row_var"], values["col_var"] = v.mean(1, keepdim=True), v.mean(0, keepdim=True)
    counts = {slot: slots[slot] for slot in COUNTS if slot in slots}
    return counts | {
        slot: value.to(slots[slot].dtype).contiguous() for slot, value in values.items()
    }


def _transposed(slots: Slots) -> Slots:
    """Transpose the moments; Adafactor's two means change places."""
    other = dict(zip(FACTORED, reversed(FACTORED), strict=True))
    return {
        other.get(slot, slot): value.mT.contiguous()
        if isinstance(value, Tensor) and value.ndim >= 2
        else value
        for slot, value in slots.items()
    }


def _of_each_matrix(old: _Pair, A: Tensor, B: Tensor, eps: float) -> tuple[Slots, Slots]:
    """Do the same for each matrix of a batch."""
    lead = A.shape[:-2]
    old_A, old_B, A, B = (factor.flatten(0, -3) for factor in (old.A, old.B, A, B))
    found = []
    for place in range(len(A)):
        of_A, of_B = _of_one(old.of_A, place), _of_one(old.of_B, place)
        pair = _Pair(old_A[place], old_B[place], of_A, of_B)
        found.append(_projected(pair, A[place], B[place], eps))
    return _stacked([pair[0] for pair in found], lead), _stacked([p[1] for p in found], lead)


def _of_one(slots: Slots, place: int) -> Slots:
    return {
        slot: value.flatten(0, -3)[place] if isinstance(value, Tensor) and value.ndim else value
        for slot, value in slots.items()
    }


def _stacked(each: list[Slots], lead: tuple[int, ...]) -> Slots:
    return {
        slot: torch.stack([slots[slot] for slots in each]).view(*lead, *value.shape)
        if isinstance(value, Tensor) and value.ndim
        else value
        for slot, value in each[0].items()
    }


def gradient_moment(
    A: Tensor, B: Tensor, M_A: Tensor | None, M_B: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return L, K with G = L K the least G to minimise |G B^T - M_A|^2 + |A^T G - M_B|^2.

    The minimum solves the Sylvester equation G B^T B + A A^T G = M_A B + A M_B =: H, which in the
    singular bases of A (U, a) and B (b, V) is a division: of the part of H in both by
    a_i^2 + b_j^2, of the rest of U^T H by a_i^2, of the rest of H V by b_j^2. What neither spans
    is zero in the least solution, so G has rank 2r at most and is never formed.
    A moment that is None leaves its term out.
    """
    U, a, _ = torch.linalg.svd(A, full_matrices=False)
    _, b, Vh = torch.linalg.svd(B, full_matrices=False)
    a = torch.zeros_like(a) if M_B is None else _clipped(a, eps * max(A.shape))
    b = torch.zeros_like(b) if M_A is None else _clipped(b, eps * max(B.shape))
    M_A = torch.zeros_like(A) if M_A is None else M_A.double()
    M_B = torch.zeros_like(B) if M_B is None else M_B.double()
    rows = (U.T @ M_A) @ B + (U.T @ A) @ M_B
    columns = M_A @ (B @ Vh.T) + A @ (M_B @ Vh.T)
    both = U.T @ columns
    inner = both * _inverse(a.square()[:, None] + b.square())
    rows = (rows - both @ Vh) * _inverse(a.square())[:, None]
    columns = (columns - U @ both) * _inverse(b.square())
    return torch.cat([U, columns], 1), torch.cat([rows + inner @ Vh, Vh])


def _clipped(singular: Tensor, relative: float) -> Tensor:
    return torch.where(singular > relative * singular.max(), singular, 0.0)


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x > 0, 1 / x, 0.0)


def _second_moments(slots: Slots) -> dict[str, Tensor]:
    """Return the second moments as matrices, Adafactor's as the one it stands for."""
    found = {slot: slots[slot].double() for slot in SECOND if slot in slots}
    if "row_var" in slots:
        row, column = slots["row_var"].double(), slots["col_var"].double()
        found["variance"] = row * column * _inverse(row.mean())
    return found


def _rescaled(v: Tensor, partner: Tensor, new_partner: Tensor) -> Tensor:
    """Return |B'_k|^2 sum_l v[i, l] / |B|^2: its variances along a row of the gradient agree."""
    along_row = v.sum(1, keepdim=True) * _inverse(partner.square().sum())
    return along_row * new_partner.square().sum(1)


def _pruned(moment: Tensor, fraction: float) -> Tensor:
    smallest = moment.abs().flatten().argsort(stable=True)[: round(fraction * moment.numel())]
    return moment.flatten().index_fill(0, smallest, 0.0).view(moment.shape)
