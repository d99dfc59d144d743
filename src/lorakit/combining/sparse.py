"""TIES and DARE: combine what is left of each change when most of its entries are dropped.

Both are defined on the entries of the changed weights and are done there, on dW, one weight at a time. On the entries
of A and B, as PEFT's "ties" and "dare" do it, they would depend on how a product was split: `(-B)(-A)` is the same
update with every sign turned, and TIES would let it cancel `B A`. What they make has no low rank, so the result is the
nearest product of a given rank, and what that leaves out is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lorakit.combining.change import dense
from lorakit.combining.how import How, Made, Term, check_density, check_rank, cut_to
from lorakit.errors import CombineError


@dataclass(frozen=True)
class Ties(How):
    """Trim each change to its largest entries, elect a sign for each entry, and average those that agree with it.

    `density` is the share that is kept, of each weight by itself (the authors' code trims the whole model as one
    vector). Weights act on the mean, after the vote, as the paper's lambda does; they are 1 unless given.
    """

    density: float = 0.2
    rank: int | None = None
    energy: float | None = None

    name: ClassVar[str] = "ties"
    paper: ClassVar[str] = "arXiv 2306.01708, algorithm 1"
    formula: ClassVar[str] = "mean of w_i trim(dW_i) over the i that agree with sign(sum_i trim(dW_i))"

    def __post_init__(self) -> None:
        check_density(self.density)
        check_rank(self.rank, self.energy)

    @property
    def averages(self) -> bool:
        """Return True: what agrees is averaged."""
        return True

    def check(self, weights: Sequence[float], rng: torch.Generator | None) -> None:
        """Raise `CombineError` for a negative weight."""
        _refuse_negative(weights)

    def made(self, terms: Sequence[Term], dtype: torch.dtype, rng: torch.Generator | None) -> Made:
        """Return the cut of the disjoint mean."""
        kept = torch.stack([trimmed(dense(term.change, dtype), self.density) for term in terms])
        return cut_to(disjoint_mean(kept, [term.weight for term in terms]), terms, self.rank, self.energy)


@dataclass(frozen=True)
class Dare(How):
    """Drop entries of each change at random and rescale the rest by `1 / density`, so that the mean stays; then add.

    With `elect`, what is left is combined as TIES does it (sign and disjoint mean) instead of added.
    """

    density: float = 0.5
    rank: int | None = None
    energy: float | None = None
    elect: bool = False

    name: ClassVar[str] = "dare"
    paper: ClassVar[str] = "arXiv 2311.03099, section 3.2"
    formula: ClassVar[str] = "sum_i w_i mask_i * dW_i / density, mask_i ~ Bernoulli(density)"

    def __post_init__(self) -> None:
        check_density(self.density)
        check_rank(self.rank, self.energy)

    @property
    def averages(self) -> bool:
        """Return whether signs are elected, for then what agrees is averaged."""
        return self.elect

    def check(self, weights: Sequence[float], rng: torch.Generator | None) -> None:
        """Raise `CombineError` without a generator, or for a negative weight in a vote."""
        if rng is None:
            raise CombineError("dare drops entries at random; give rng=torch.Generator().manual_seed(0)")
        if self.elect:
            _refuse_negative(weights)

    def made(self, terms: Sequence[Term], dtype: torch.dtype, rng: torch.Generator | None) -> Made:
        """Return the cut of what is left, added or voted on."""
        assert rng is not None
        kept = torch.stack([dropped(dense(term.change, dtype), self.density, rng) for term in terms])
        weights = [term.weight for term in terms]
        joined = disjoint_mean(kept, weights) if self.elect else torch.tensordot(kept.new_tensor(weights), kept, 1)
        return cut_to(joined, terms, self.rank, self.energy)


def trimmed(change: Float[Tensor, "*shape"], density: float) -> Float[Tensor, "*shape"]:
    """Return the `density` share of entries with the largest magnitude, at least one, and 0 elsewhere."""
    flat = change.flatten()
    largest = flat.abs().topk(max(1, round(density * flat.numel()))).indices
    return torch.zeros_like(flat).scatter(0, largest, flat[largest]).reshape(change.shape)


def dropped(change: Float[Tensor, "*shape"], density: float, rng: torch.Generator) -> Float[Tensor, "*shape"]:
    """Return the entries a Bernoulli(density) mask keeps, divided by `density`, and 0 elsewhere; drawn on the CPU."""
    mask = torch.bernoulli(torch.full(change.shape, density, dtype=torch.float32), generator=rng)
    return change * mask.to(change.dtype) / density


def disjoint_mean(changes: Float[Tensor, " k *shape"], weights: Sequence[float]) -> Float[Tensor, "*shape"]:
    """Return the mean of `w_i change_i` over the changes whose entry has the sign of their sum, entry by entry.

    The vote is unweighted and counts size; where the changes cancel to exactly 0 nobody is elected, and the mean is 0.
    """
    agree = changes.sign() == changes.sum(0).sign()
    scaled = changes * changes.new_tensor(weights).view(-1, *[1] * (changes.dim() - 1))
    return (scaled * agree).sum(0) / agree.sum(0).clamp_min(1)


def _refuse_negative(weights: Sequence[float]) -> None:
    if bad := [weight for weight in weights if weight < 0]:
        raise CombineError(
            f"weight {bad[0]:g}: signs are elected before weights act, so a negative weight would vote for what it is "
            "against; negate(state) that adapter and give its weight without the sign"
        )
