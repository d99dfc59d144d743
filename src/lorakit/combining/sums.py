"""Weighted sums of changes: exact, exact and stacked, of a given rank, and of the factors instead of the products.

linear      sum_i w_i s_i B_i A_i, at the rank the sum has
concat      the same, as [B_1, B_2, ...] [w_1 s_1 A_1; ...]: ranks add up
svd         the nearest product of a given rank
factorwise  (sum_i B_i) (sum_j A_j): what other tools call linear; its terms with i != j are nobody's update
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorakit.combining.change import Pair, added
from lorakit.combining.how import How, Made, Term, check_rank, cut_to, pairs_of, whole
from lorakit.core.as_lora import within_the_weight
from lorakit.errors import CombineError


@dataclass(frozen=True)
class Linear(How):
    """The weighted sum, exactly, at the rank it has: two adapters alike make one of their own rank.

    Concatenated and brought to the fewest directions by QR and SVD of the factors, so there is no term `B_i A_j`. With
    weights of any sign this is task arithmetic: `(1, 1)` adds, `(-1,)` forgets, `(1, 1, -1)` is the analogy c + b - a.
    """

    name: ClassVar[str] = "linear"
    paper: ClassVar[str] = "arXiv 2212.04089 (task arithmetic)"
    formula: ClassVar[str] = "sum_i w_i dW_i"

    def made(self, terms: Sequence[Term], dtype: torch.dtype, rng: torch.Generator | None) -> Made:
        """Return the sum at its own rank."""
        return whole(added(pairs_of(terms), [term.weight for term in terms]), terms)


@dataclass(frozen=True)
class Concat(How):
    """The weighted sum, exactly, as the given factors stacked: `[B_1, B_2, ...] [w_1 s_1 A_1; w_2 s_2 A_2; ...]`.

    The rank is the sum of ranks, or the weight's own highest where that is lower.
    """

    name: ClassVar[str] = "concat"
    paper: ClassVar[str] = "arXiv 2409.05976 (FLoRA, section 3.2)"
    formula: ClassVar[str] = "[B_1, B_2, ...] [w_1 s_1 A_1; w_2 s_2 A_2; ...]"

    def made(self, terms: Sequence[Term], dtype: torch.dtype, rng: torch.Generator | None) -> Made:
        """Return the factors side by side."""
        stacked = added(pairs_of(terms), [term.weight for term in terms])
        assert isinstance(stacked, Pair)
        return Made(Pair.of(*within_the_weight(*stacked.factors)))


@dataclass(frozen=True)
class Svd(How):
    """The product nearest to the weighted sum: of a rank, or of the lowest rank that keeps a share of its energy.

    With neither, the highest rank among the adapters at each weight. Takes every change of a weight, low-rank or not.
    """

    rank: int | None = None
    energy: float | None = None

    name: ClassVar[str] = "svd"
    paper: ClassVar[str] = "Eckart and Young 1936, Psychometrika 1(3)"
    formula: ClassVar[str] = "argmin_(rank X <= r) |X - sum_i w_i dW_i|_F"

    def __post_init__(self) -> None:
        check_rank(self.rank, self.energy)

    def made(self, terms: Sequence[Term], dtype: torch.dtype, rng: torch.Generator | None) -> Made:
        """Return the leading triplets of the sum."""
        total = added([term.change for term in terms], [term.weight for term in terms])
        return cut_to(total, terms, self.rank, self.energy)


@dataclass(frozen=True)
class Factorwise(How):
    """Factors summed apart, as PEFT's "linear" does: not the sum of the updates, and rarely near it.

    `B = sum_i sqrt(|w_i s_i|) B_i`, `A = sum_i sign(w_i) sqrt(|w_i s_i|) A_i`, whose product is the weighted sum and,
    beside it, every `B_i A_j` with i != j. It depends on how each product was split into factors, which no update does.
    """

    name: ClassVar[str] = "factorwise"
    paper: ClassVar[str] = "PEFT's add_weighted_adapter, combination_type linear"
    formula: ClassVar[str] = "(sum_i sqrt(|w_i s_i|) B_i) (sum_i sign(w_i) sqrt(|w_i s_i|) A_i)"

    def made(self, terms: Sequence[Term], dtype: torch.dtype, rng: torch.Generator | None) -> Made:
        """Return the product of the summed factors; `left` is `s_i B_i`."""
        pairs = pairs_of(terms)
        on_left = [math.sqrt(abs(term.weight) / term.scale) for term in terms]
        on_right = [math.copysign(math.sqrt(abs(term.weight) * term.scale), term.weight) for term in terms]
        return Made(factors_summed(pairs, on_left, on_right))


def factors_summed(pairs: Sequence[Pair], on_left: Sequence[float], on_right: Sequence[float]) -> Pair:
    """Return `(sum_i a_i L_i) (sum_i b_i R_i)`, or raise `CombineError` where the ranks differ."""
    if len(ranks := {pair.rank for pair in pairs}) > 1:
        raise CombineError(
            f"factors of ranks {', '.join(map(str, sorted(ranks)))} cannot be added; linear and concat take any ranks"
        )
    return Pair(_weighted([pair.left for pair in pairs], on_left), _weighted([pair.right for pair in pairs], on_right))


def _weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    first, *others = (weight * tensor for weight, tensor in zip(weights, tensors, strict=True))
    return sum(others, first)
