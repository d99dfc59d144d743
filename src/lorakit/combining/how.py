"""What a way of combining is: from the changes of one weight, each with its weight in the sum, one product of factors.

A way is a value, so its numbers are fields: `Svd(rank=8)`, `Ties(density=0.2, rank=16)`. Each way is one class, and
`combine` takes it by value or, with its defaults, by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lorakit.combining.change import Change, Pair, size, triplets
from lorakit.core.approximation import Loss
from lorakit.core.checks import check_whole
from lorakit.errors import CombineError, SpecError


@dataclass(frozen=True, eq=False)
class Term:
    """One adapter's `weight * change` of one weight; `change` contains the s of its method, which is `scale`."""

    weight: float
    change: Change
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Made:
    """What a way made of the terms of one weight, and what its rank left out of that, where it cut one."""

    pair: Pair
    cut: Loss | None = None


@dataclass(frozen=True)
class How(ABC):
    """A way to make one change of a weight from several."""

    name: ClassVar[str]
    paper: ClassVar[str]
    formula: ClassVar[str]

    @property
    def averages(self) -> bool:
        """Return whether the result is a mean of the changes, and not their sum: what is trained whole follows it."""
        return False

    def check(self, weights: Sequence[float], rng: torch.Generator | None) -> None:  # noqa: B027 - most take any
        """Raise `CombineError` for weights this way cannot use, or a generator it needs and has not."""

    @abstractmethod
    def made(self, terms: Sequence[Term], dtype: torch.dtype, rng: torch.Generator | None) -> Made:
        """Return the combination of the terms of one weight; matrices are formed in `dtype`.

        Raises:
            CombineError: terms this way does not take, with the reason; the caller adds the place.
        """


def pairs_of(terms: Sequence[Term]) -> list[Pair]:
    """Return the factors of every term, or raise `CombineError` where one has none."""
    found = [term.change for term in terms if isinstance(term.change, Pair)]
    if len(found) < len(terms):
        raise CombineError(
            "a change that is no product of factors, so that their sum is none either; how=Svd(rank=...) comes as near "
            "as its rank allows and says how near that is"
        )
    return found


def check_rank(rank: int | None, energy: float | None) -> None:
    """Raise `SpecError` unless `rank` is a whole number, or `energy` a share, or neither is given."""
    if rank is not None and energy is not None:
        raise SpecError("rank and energy both say how much to keep; give one of them")
    if rank is not None:
        check_whole("rank", rank)
    if energy is not None and not (isinstance(energy, int | float) and 0 < energy <= 1):
        raise SpecError(f"energy must lie above 0 and up to 1, not {energy!r}; 0.9 keeps 90 % of the squared size")


def check_density(density: float) -> None:
    """Raise `SpecError` unless `density` is the share of entries that is kept."""
    if not (isinstance(density, int | float) and 0 < density <= 1):
        raise SpecError(f"density is the share of entries that is kept, above 0 and up to 1, not {density!r}")


def cut_to(change: Change, terms: Sequence[Term], rank: int | None, energy: float | None) -> Made:
    """Return the product of the given rank nearest to `change`, and what that leaves out.

    With `rank`, r of all groups together; with `energy`, the lowest rank with `sum_(i <= r) sigma_i^2 >= energy
    sum_i sigma_i^2`; with neither, the highest rank among the terms. The error is `sqrt(sum_(i > r) sigma_i^2)`
    (Eckart and Young 1936). Directions beyond the change's own rank are left out, whatever rank was asked for.
    """
    u, s, vh = triplets(change)
    nothing = rounding(change, terms)
    s = s.where(s > nothing, 0)
    own = own_rank(s, nothing)
    if energy is not None:
        kept = rank_for(s, energy)
    elif rank is not None:
        if rank % len(s):
            raise CombineError(f"rank {rank} is not a multiple of its {len(s)} groups")
        kept = rank // len(s)
    else:
        ranks = [term.change.rank for term in terms if isinstance(term.change, Pair)]
        if len(ranks) < len(terms):
            raise CombineError("a change that is no product of factors tells no rank; give rank or energy")
        kept = max(ranks)
    kept = min(kept, own)
    return Made(balanced(u, s, vh, kept), Loss(float(s[:, kept:].norm()), float(s.norm())))


def whole(change: Change, terms: Sequence[Term]) -> Made:
    """Return the product equal to `change` of the lowest rank."""
    u, s, vh = triplets(change)
    nothing = rounding(change, terms)
    s = s.where(s > nothing, 0)  # where the terms cancel, what is left is no change
    return Made(balanced(u, s, vh, own_rank(s, nothing)))


def rounding(change: Change, terms: Sequence[Term]) -> float:
    """Return what is rounded off the terms while they are added: what is left below it where they cancel is nothing.

    `max(m, n)` roundings for factors, as numpy's matrix_rank has it, and k for a sum of k matrices.
    """
    if isinstance(change, Pair):
        errors = max(change.left.shape[1], change.right.shape[2]) * torch.finfo(torch.float64).eps
    else:
        errors = len(terms) * torch.finfo(change.dtype).eps
    return errors * sum(abs(term.weight) * size(term.change) for term in terms)


def balanced(u: Float[Tensor, "g m k"], s: Float[Tensor, "g k"], vh: Float[Tensor, "g k n"], rank: int) -> Pair:
    """Return `(U S^(1/2)) (S^(1/2) V^T)` of the first `rank` triplets."""
    root = s[:, :rank].sqrt()
    return Pair(u[:, :, :rank] * root.unsqueeze(1), root.unsqueeze(2) * vh[:, :rank])


def rank_for(s: Float[Tensor, "g k"], energy: float) -> int:
    """Return the lowest r of each group with `sum_(i <= r) sigma_i^2 >= energy sum_i sigma_i^2`; at least 1."""
    squares = s.square().sum(0)
    left_out = squares.flip(0).cumsum(0).flip(0)[1:]  # after 1, 2, ... directions
    total = float(squares.sum())
    slack = 4 * torch.finfo(torch.float64).eps * total
    return 1 + int((left_out > total - energy * total + slack).sum())


def own_rank(s: Float[Tensor, "g k"], nothing: float) -> int:
    """Return how many directions exceed what fp32, as factors are stored, rounds off the largest; at least 1."""
    least = max(nothing, torch.finfo(torch.float32).eps * float(s.max()))
    return max(1, int((s > least).sum(1).max()))
