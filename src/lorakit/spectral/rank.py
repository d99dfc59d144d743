"""How many directions a spectrum really uses: energy, and four effective ranks that weigh its tail differently.

All are functions of singular values alone, do not change when these are scaled, and are n for n equal ones:

    stable          sum sigma^2 / sigma_1^2              the largest value counts most
    participation   (sum sigma^2)^2 / sum sigma^4
    nuclear         (sum sigma)^2 / sum sigma^2
    entropy         exp(-sum p ln p), p = sigma / sum sigma    the tail counts most

stable <= participation <= nuclear <= entropy <= n. Some code takes sigma^2 for p, which gives less than entropy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lorakit.core import factored
from lorakit.errors import SpecError

SATURATED = 0.9
"""The share of its rank an update uses, by the entropy rank, from which on it is called saturated."""


def energy(sigma: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Return the curve `E(j) = sum_(i <= j) sigma_i^2 / sum sigma^2`, largest first, in fp64; 0 for an update of 0."""
    summed = _normed(sigma).square().cumsum(0)
    return summed / summed[-1] if summed[-1] > 0 else summed


def rank_at(sigma: Float[Tensor, " k"], share: float = 0.9) -> int:
    """Return the smallest j with `E(j) >= share`: how many directions hold that share of the energy.

    0 for an update of 0. A share of 1 asks for all that fp64 can tell from nothing.

    Raises:
        SpecError: a share that is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise SpecError(f"share must be above 0 and at most 1, not {share!r}")
    curve = energy(sigma)
    return int((curve < share).sum()) + 1 if curve[-1] > 0 else 0


def entropy_rank(sigma: Float[Tensor, " k"]) -> float:
    """Return `exp(-sum p ln p)` with `p = sigma / sum sigma` (Roy and Vetterli, EUSIPCO 2007); 0 for an update of 0."""
    values = _normed(sigma)
    return float(factored.entropy_rank(values)) if values[0] > 0 else 0.0


def stable_rank(sigma: Float[Tensor, " k"]) -> float:
    """Return `|dW|_F^2 / |dW|_2^2 = sum sigma^2 / sigma_1^2`; 0 for an update of 0."""
    return float(_normed(sigma).square().sum())


def participation_ratio(sigma: Float[Tensor, " k"]) -> float:
    """Return `(sum sigma^2)^2 / sum sigma^4`; 0 for an update of 0."""
    squares = _normed(sigma).square()
    return _ratio(squares.sum().square(), squares.square().sum())


def nuclear_rank(sigma: Float[Tensor, " k"]) -> float:
    """Return `|dW|_*^2 / |dW|_F^2 = (sum sigma)^2 / sum sigma^2`; 0 for an update of 0."""
    values = _normed(sigma)
    return _ratio(values.sum().square(), values.square().sum())


EFFECTIVE_RANKS: dict[str, Callable[[Tensor], float]] = {
    "entropy": entropy_rank,
    "stable": stable_rank,
    "participation": participation_ratio,
    "nuclear": nuclear_rank,
}
"""The four, by name."""


def numerical_rank(sigma: Float[Tensor, " k"], m: int, n: int) -> int:
    """Return how many of the singular values of an `(m, n)` matrix are not 0 to rounding.

    Above `sigma_1 max(m, n) eps`, with eps of the dtype they were computed in: the rule of `torch.linalg.matrix_rank`.
    """
    _check(sigma)
    return int((sigma > sigma.max() * max(m, n) * torch.finfo(sigma.dtype).eps).sum())


def is_dead(sigma: Float[Tensor, " k"]) -> bool:
    """Return whether the update is exactly 0: it never learned, or all of it was pruned."""
    _check(sigma)
    return not sigma.any()


def is_saturated(sigma: Float[Tensor, " k"], share: float = SATURATED) -> bool:
    """Return whether the update spreads over nearly all the directions it has, so that more rank might be used.

    `entropy rank >= share * k`. A product of random factors does so too: it says that rank is used, not that it helps.
    Of one direction it says nothing, so that is not saturated.
    """
    used = entropy_rank(sigma)
    return len(sigma) > 1 and used >= share * len(sigma)


def _ratio(above: Tensor, below: Tensor) -> float:
    return float(above / below) if below > 0 else 0.0


def _normed(sigma: Tensor) -> Tensor:
    """Return the values over the largest one, in fp64 and descending: their 4th powers neither overflow nor vanish."""
    _check(sigma)
    values = sigma.double().sort(descending=True).values
    return values / values[0] if values[0] > 0 else values


def _check(sigma: Tensor) -> None:
    if not len(sigma) or not sigma.isfinite().all() or (sigma < 0).any():
        raise SpecError("singular values must be finite numbers of at least 0, and at least one")
