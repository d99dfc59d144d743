"""LoftQ: start a quantised base close to the dense one it came from (arXiv 2310.08659).

Minimise `|W - Q - B A|_F` over quantised Q and rank-r `B A`, in turn: `Q = q(W - B A)`, `B A` = the best rank-r
approximation of `W - Q` (algorithm 1). `loftq` is that loop, for whoever quantises the base; the initialisation takes
the last half step on a base that is quantised already, with the dense weight as evidence. Its first forward is not the
base's, by design. `s B A` has to be the residual, so both factors carry `1/sqrt(s)`; PEFT forgets it, and starts right
for alpha = r alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lorakit.core.init import Init, Need, by_group, leading
from lorakit.core.method import Start
from lorakit.core.site import Site
from lorakit.errors import SpecError


@dataclass(frozen=True)
class LoftQ(Init):
    """Start on the r largest singular triplets of what quantisation took from W."""

    name: ClassVar[str] = "loftq"
    paper: ClassVar[str] = "arXiv 2310.08659"
    starts_at_zero: ClassVar[bool] = False
    needs: ClassVar[Need | None] = "weight"

    def check_evidence(self, site: Site, weight: Tensor, evidence: Tensor | None) -> None:
        """Raise `SpecError` without the dense weight, or where the base is that dense weight: 0 never learns."""
        super().check_evidence(site, weight, evidence)
        if evidence is not None and torch.equal(evidence.to(weight), weight):
            raise SpecError(
                "init loftq corrects a quantised base, and this weight is the dense one; "
                "quantise the base first, or use init pissa"
            )

    def fill(self, down: Tensor, up: Tensor, scale: float, start: Start) -> None:
        """Split the principal part of the residual evenly between the factors."""
        assert start.evidence is not None
        residual = start.evidence.to(start.weight.device, torch.float32) - start.weight
        u, s, vh = leading(by_group(start.site, residual), up.shape[1])
        root = (s / scale).sqrt()
        up.copy_((u * root.unsqueeze(-2)).reshape(up.shape))
        down.copy_((root.unsqueeze(-1) * vh).reshape(down.shape))


def loftq(
    weight: Float[Tensor, "m n"], rank: int, round_trip: Callable[[Tensor], Tensor], iterations: int = 5
) -> tuple[Float[Tensor, "m n"], Float[Tensor, "r n"], Float[Tensor, "m r"]]:
    """Return `(Q, down, up)` with `Q + up @ down` close to `weight`, Q on the quantiser's grid.

    Args:
        weight: the dense weight.
        rank: of the correction.
        round_trip: quantise and dequantise; the same shape comes back.
        iterations: alternations; 0 is `Q = q(W)` and no correction, which is QLoRA's start.

    Each step is the best one with the other part held, if `round_trip` gives the nearest point of a fixed grid; so the
    error never rises there, and with a grid that follows the weight, such as NF4's, hardly in practice.

    Raises:
        SpecError: a rank below 1 or above min(m, n), negative iterations.
    """
    if not 1 <= rank <= min(weight.shape):
        raise SpecError(f"rank {rank} must be from 1 to min(m, n) = {min(weight.shape)}")
    if iterations < 0:
        raise SpecError(f"iterations must be a whole number from 0, not {iterations}")
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    down, up = weight.new_zeros(rank, weight.shape[1]), weight.new_zeros(weight.shape[0], rank)
    quantised = round_trip(weight)
    for i in range(iterations):
        if i:
            quantised = round_trip(weight - up @ down)
        (u,), (s,), (vh,) = leading((weight - quantised).unsqueeze(0), rank)
        up, down = u * s.sqrt(), s.sqrt().unsqueeze(-1) * vh
    return quantised, down, up
