"""The start LoRA was published with: a random A, and B = 0.

`A ~ U(-1/sqrt(n), 1/sqrt(n))`, Kaiming's uniform law with `a = sqrt(5)`, as torch draws a linear layer; the code of
arXiv 2106.09685 and PEFT do so too (the paper's own words are "random Gaussian").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lorakit.core.init import Init
from lorakit.core.method import Start


@dataclass(frozen=True)
class Kaiming(Init):
    """Start at dW = 0 with A ~ U(-1/sqrt(n), 1/sqrt(n)); an embedding the other way round, A = 0 and B ~ N(0, 1)."""

    name: ClassVar[str] = "kaiming"
    paper: ClassVar[str] = "arXiv 2106.09685 (its code)"

    def fill(self, down: Tensor, up: Tensor, scale: float, start: Start) -> None:
        """Draw one factor and zero the other."""
        if start.site.kind == "embedding":
            nn.init.zeros_(down)
            nn.init.normal_(up, generator=start.rng)
        else:
            nn.init.kaiming_uniform_(down.flatten(1), a=math.sqrt(5), generator=start.rng)
            nn.init.zeros_(up)
