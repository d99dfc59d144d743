"""LoRA-GA: start where the first step is the best one a pair can take (arXiv 2407.05000).

Of the SVD `G = U S V^T` of the weight's gradient, `A0 = c V_r^T` and `B0 = c U_(r+1..2r)` (the authors' code calls it
ArB2r), with `c = m^(1/4) / sqrt(gamma)`, m the height of the weight (its "stable" scale). One SGD step of rate eta from
there changes W, to first order, by `-eta s^2 c^2` times the best rank-2r approximation of G. PEFT 0.21 multiplies B by
S and leaves A unscaled, with which that does not hold. Here the base stays and the pair subtracts its start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorakit.core.checks import check_positive
from lorakit.core.init import Init, Need, by_group, check_iterations, leading
from lorakit.core.method import Start
from lorakit.core.site import Site
from lorakit.errors import SpecError


@dataclass(frozen=True)
class LoRAGA(Init):
    """Start on the 2r largest singular vectors of the gradient of W, r of them in each factor."""

    gamma: float = 16.0
    iterations: int | None = None

    name: ClassVar[str] = "lora-ga"
    paper: ClassVar[str] = "arXiv 2407.05000"
    starts_at_zero: ClassVar[bool] = False
    keeps_start: ClassVar[bool] = True
    needs: ClassVar[Need | None] = "gradients"

    def __post_init__(self) -> None:
        check_positive("gamma", self.gamma, hint="; the authors use 16 to 64")
        check_iterations(self.iterations)

    def check(self, rank: int, site: Site) -> None:
        """Raise `SpecError` where the gradient has no 2r singular vectors."""
        super().check(rank, site)
        if 2 * rank > site.max_rank:
            raise SpecError(
                f"init lora-ga takes 2 * {rank} singular vectors of the gradient, which has {site.max_rank}; "
                f"use rank {site.max_rank // 2} or less, or exclude this path"
            )

    def fill(self, down: Tensor, up: Tensor, scale: float, start: Start) -> None:
        """Give V's leading rows to A and the next columns of U to B."""
        assert start.evidence is not None
        gradient = by_group(start.site, start.evidence.to(start.weight.device))
        rank, c = up.shape[1], gradient.shape[1] ** 0.25 / math.sqrt(self.gamma)
        u, _, vh = leading(gradient, 2 * rank, self.iterations, start.rng)
        up.copy_((c * u[..., rank:]).reshape(up.shape))
        down.copy_((c * vh[..., :rank, :]).reshape(down.shape))
