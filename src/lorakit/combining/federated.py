"""Federated rounds as values: adapters of several clients become one, by averaging factors or by stacking them.

FedAvg of the factors is not the average of the updates: with `sum_k p_k = 1`,

    sum_k p_k B_k A_k - (sum_k p_k B_k) (sum_k p_k A_k) = sum_k p_k (B_k - mean B) (A_k - mean A),

the covariance of B and A over the clients, which is 0 only where all share A, or all share B. FLoRA (arXiv 2409.05976,
NeurIPS 2024; not the FLoRA of 2312.05677) stacks them instead, which is exact and takes any ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.combining.change import Pair
from lorakit.combining.combination import Combined, combine
from lorakit.combining.how import How, Made, Term, pairs_of
from lorakit.combining.lineup import checked_weights
from lorakit.combining.sums import Concat, factors_summed
from lorakit.combining.trained import ROUNDING
from lorakit.core.state import AdapterState, trim
from lorakit.errors import CombineError, listing


@dataclass(frozen=True)
class _Average(How):
    """`(sum_k p_k s_k B_k) (sum_k p_k A_k)`; padded, a factor is 0 in the directions that it has not."""

    padded: bool = False

    name: ClassVar[str] = "average-factors"
    paper: ClassVar[str] = "arXiv 1602.05629 (FedAvg), on factors as FedIT does (2305.05644)"
    formula: ClassVar[str] = "(sum_k p_k s_k B_k) (sum_k p_k A_k)"

    def made(self, terms: Sequence[Term], dtype: torch.dtype, rng: torch.Generator | None) -> Made:
        """Return the product of the mean factors."""
        shares, pairs = [term.weight for term in terms], pairs_of(terms)
        most = max(pair.rank for pair in pairs)
        return Made(factors_summed([_padded(pair, most) if self.padded else pair for pair in pairs], shares, shares))


def average_factors(
    states: Sequence[AdapterState],
    weights: Sequence[float] | None = None,
    *,
    padded: bool = False,
    base: Mapping[str, Tensor] | None = None,
) -> Combined:
    """Return the adapter of the mean factors (FedAvg): `B = sum_k p_k s_k B_k`, `A = sum_k p_k A_k`, and its error.

    Its error is the size of the covariance `sum_k p_k (s_k B_k - B) (A_k - A)`. Every client must have the same layers,
    and without `padded` the same ranks; tensors trained whole are averaged.

    Args:
        states: the clients' adapters, of one base.
        weights: the share p_k of each client, such as its part of the rows; above 0, summing to 1. Equal unless given.
        padded: let factors of lower ranks be 0 in the directions they lack (HetLoRA, arXiv 2401.06432, section 3.2),
            which shrinks what the clients of high rank have there.
        base: the base's own values where they are asked for, as `combine` takes them.

    Raises:
        CombineError: shares that do not sum to 1, clients with other layers or ranks; else as `combine`.
    """
    shares = _shares(states, weights)
    sets = [{update.site.key for update in trim(state).updates} for state in states]
    every = sorted(set().union(*sets))
    if missing := [f"{key}: client {i} has none" for i, own in enumerate(sets, 1) for key in every if key not in own]:
        raise CombineError(f"clients lack layers of others, so factors have no mean; stack them:\n{listing(missing)}")
    return combine(states, _Average(padded), shares, base=base)


def stack(
    states: Sequence[AdapterState],
    weights: Sequence[float] | None = None,
    *,
    base: Mapping[str, Tensor] | None = None,
) -> Combined:
    """Return the exact mean of the clients' updates (FLoRA): `B = [B_1, ...]`, `A = [p_1 A_1; ...]`, rank `sum_k r_k`.

    Ranks and scales may differ by client and layer; a layer that a client lacks changes by 0 there. The server merges
    the result and clients start anew, or sends it down, which costs `sum_k r_k` ranks each.

    Args:
        states: the clients' adapters, of one base.
        weights: the share p_k of each client; above 0, summing to 1. Equal unless given.
        base: the base's own values where they are asked for, as `combine` takes them.

    Raises:
        CombineError: shares that do not sum to 1; else as `combine`.
    """
    return combine(states, Concat(), _shares(states, weights), base=base)


def _padded(pair: Pair, rank: int) -> Pair:
    """Return the same product as one of this rank, whose last directions are 0."""
    more = rank - pair.rank
    return Pair(F.pad(pair.left, (0, more)), F.pad(pair.right, (0, 0, 0, more)))


def _shares(states: Sequence[AdapterState], weights: Sequence[float] | None) -> list[float]:
    """Return one share a client, above 0 and summing to 1."""
    shares = checked_weights(states, weights)
    if weights is None:
        shares = [1 / len(states)] * len(states)
    if min(shares) <= 0 or abs(sum(shares) - 1) > ROUNDING:
        shown = ", ".join(f"{share:g}" for share in shares)
        raise CombineError(
            f"the shares {shown} sum to {sum(shares):g}; give each client its part of the whole, above 0 and summing "
            "to 1, such as its rows over all rows"
        )
    return shares
