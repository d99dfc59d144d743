"""LoRA and rsLoRA: a trained product of two thin matrices beside a frozen weight.

`dW = s B A` with `down (r, in)` = A and `up (out, r)` = B of arXiv 2106.09685, eq. 3, and `s = alpha / r`. The
rank-stabilised form of arXiv 2312.03732 changes one thing, `s = alpha / sqrt(r)`, so that high ranks keep learning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from lorakit.core.method import LowRank, Start, Tensors, down_up
from lorakit.core.site import Decl, Site
from lorakit.errors import SpecError


@dataclass(frozen=True)
class LoRA(LowRank):
    """Add `s B A`: `s = alpha / rank`, or `alpha / sqrt(rank)` when stabilised (rsLoRA)."""

    rank: int = 16
    alpha: float = 32.0
    stabilised: bool = False

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "arXiv 2106.09685 (LoRA), 2312.03732 (rsLoRA)"
    formula: ClassVar[str] = "dW = s B A, s = alpha / rank (stabilised: alpha / sqrt(rank))"
    count: ClassVar[str] = "rank * (m + n)"
    peft: ClassVar[str | None] = "LORA"

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise SpecError(f"rank must be a whole number of at least 1, not {self.rank!r}; exclude a layer to skip it")
        if not (isinstance(self.alpha, int | float) and math.isfinite(self.alpha) and self.alpha > 0):
            raise SpecError(f"alpha must be a positive number, not {self.alpha!r}; the usual choice is 2 * rank")

    @property
    def scale(self) -> float:
        """Return s."""
        return self.alpha / (math.sqrt(self.rank) if self.stabilised else self.rank)

    def tensors(self, site: Site) -> dict[str, Decl]:
        """Declare r (in + out) parameters."""
        return down_up(self.rank, site)

    def init(self, p: Tensors, start: Start) -> None:
        """Start at dW = 0: A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0; an embedding the other way round, B ~ N(0, 1)."""
        if start.site.kind == "embedding":
            nn.init.zeros_(p["down"])
            nn.init.normal_(p["up"], generator=start.rng)
        else:
            nn.init.kaiming_uniform_(p["down"].flatten(1), a=math.sqrt(5), generator=start.rng)
            nn.init.zeros_(p["up"])

    def factors(self, p: Tensors) -> tuple[Float[Tensor, "r in *kernel"], Float[Tensor, "out rg"]]:
        """Return `(A, s B)`."""
        return p["down"], self.scale * p["up"]
