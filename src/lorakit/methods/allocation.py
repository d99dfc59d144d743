"""Rank as a budget: shared out by score, and a pair of factors resized without changing what it does.

Both are pure arithmetic, for methods whose ranks differ between layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lorakit.core.factored import factored
from lorakit.errors import SpecError

NEVER_NOTHING = 1e-9
"""A score below this part of the highest counts as this part of it: whatever the limits leave goes somewhere."""


def allocate(
    scores: Sequence[float], budget: int, low: int, high: int, costs: Sequence[int] | None = None
) -> list[int]:
    """Return one rank a score, `clip(x * score, low, high)` with x such that `sum(cost * rank)` is the budget.

    x is found by bisection, for the sum grows with it; fractions are rounded by largest remainder, of equal ones the
    first. Without costs (1 each) the ranks sum to the budget exactly; with costs, no rank that could be rounded up
    still fits into what is left.

    Args:
        scores: at least 0; all 0 counts as all equal.
        budget: what all ranks together may cost.
        low, high: limits of every rank.
        costs: of one rank at each place, in the unit of the budget: `out + in` for a pair of factors.

    Raises:
        SpecError: a budget that ranks within the limits cannot meet, with those they can; a score that is no score.
    """
    costs = [1] * len(scores) if costs is None else costs
    if bad := [s for s in scores if not (math.isfinite(s) and s >= 0)]:
        raise SpecError(f"scores must be finite numbers of at least 0, not {bad[0]!r}")
    least, most = low * sum(costs), high * sum(costs)
    if not least <= budget <= most:
        raise SpecError(
            f"a budget of {budget} cannot be met by {len(scores)} ranks of {low} to {high}, which cost {least} to "
            f"{most}; choose a budget in that range, or move the limits"
        )
    top = max(scores) or 1.0
    weights = [max(s / top, NEVER_NOTHING) if any(scores) else 1.0 for s in scores]
    shares = _shares(weights, budget, low, high, costs)
    ranks = [math.floor(share + 1e-9) for share in shares]
    left = budget - sum(c * r for c, r in zip(costs, ranks, strict=True))
    remainders = [round(share - rank, 9) for share, rank in zip(shares, ranks, strict=True)]
    for i in sorted(range(len(ranks)), key=lambda i: -remainders[i]):
        if remainders[i] > 0 and costs[i] <= left:
            ranks[i] += 1
            left -= costs[i]
    return ranks


@torch.no_grad()
def resize(
    down: Float[Tensor, "high in"], up: Float[Tensor, "out high"], gate: Float[Tensor, " high"], rank: int
) -> None:
    """Let the `rank` strongest directions of `(up * gate) @ down` act, in place; further ones start at 0.

    Growing changes nothing; shrinking leaves the best approximation of that rank, with the squared error
    `sum_{i > rank} sigma_i^2` (Eckart and Young). Every row of `down` gets the size a row had on average, so that
    each direction learns alike; a direction that is dropped keeps its row, and comes back with `up` 0.
    """
    now = int(gate.sum())
    left, sigma, right = factored(down[:now], up[:, :now])
    size = max(float(down[:now].norm()) / math.sqrt(now), torch.finfo(down.dtype).tiny)
    down[:now] = size * right
    up[:, :now] = left * (sigma / size)
    up[:, min(now, rank) :] = 0.0
    gate.copy_(torch.arange(len(gate)) < rank)


def _shares(weights: Sequence[float], budget: int, low: int, high: int, costs: Sequence[int]) -> list[float]:
    """Return `clip(x * weight, low, high)` with x bisected to the last bit."""

    def at(x: float) -> list[float]:
        return [min(max(x * w, low), high) for w in weights]

    def cost(x: float) -> float:
        return math.fsum(c * share for c, share in zip(costs, at(x), strict=True))

    below, above = 0.0, high / min(weights)
    while below < (middle := (below + above) / 2) < above:
        below, above = (middle, above) if cost(middle) <= budget else (below, middle)
    return at(below)
