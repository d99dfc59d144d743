"""A Gaussian start, as the paper's text has it: `A ~ N(0, r^(-2 power))`, B = 0.

With `power` 1/2 the standard deviation is `1/sqrt(r)`, so that `|A x|^2` does not depend on the rank; 1 gives `1/r`,
what PEFT's `init_lora_weights="gaussian"` draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lorakit.core.checks import is_number
from lorakit.core.init import Init
from lorakit.core.method import Start
from lorakit.errors import SpecError


@dataclass(frozen=True)
class Gaussian(Init):
    """Start at dW = 0 with A ~ N(0, std^2), std = r^-power; an embedding the other way round, A = 0 and B drawn."""

    power: float = 0.5

    name: ClassVar[str] = "gaussian"
    paper: ClassVar[str] = "arXiv 2106.09685, section 4.1"

    def __post_init__(self) -> None:
        if not (is_number(self.power) and self.power >= 0):
            raise SpecError(f"power must be a number from 0, not {self.power!r}; std is 1/sqrt(r) at 0.5 and 1/r at 1")

    def fill(self, down: Tensor, up: Tensor, scale: float, start: Start) -> None:
        """Draw one factor and zero the other; r counts all groups of a convolution."""
        drawn, rest = (up, down) if start.site.kind == "embedding" else (down, up)
        nn.init.normal_(drawn, std=down.shape[0] ** -self.power, generator=start.rng)
        nn.init.zeros_(rest)
