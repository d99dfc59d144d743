"""Where a pair of factors starts: an initialisation is a value, a field of the methods that have such a pair.

Most start at dW = 0. One that starts elsewhere, on the principal part of W for instance, does not move the base: the
pair keeps a copy of its start, and the update is what it has learned since, `dW = s (B A - B0 A0)`. So the base stays
as it was, adapters still add up in any order, and the update is exactly a LoRA of twice the rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lorakit.core.method import Start


@dataclass(frozen=True)
class Init(ABC):
    """The first values of `down (r, in, *kernel)` and `up (out, r / groups)`."""

    name: ClassVar[str]
    paper: ClassVar[str]
    starts_at_zero: ClassVar[bool] = True
    """Whether `up @ down` is 0 at the start; if not, the method subtracts the start."""
    needs: ClassVar[Literal["inputs", "gradients"] | None] = None
    """What has to be measured at each site first; it arrives as `start.evidence`."""

    @abstractmethod
    def fill(self, down: Tensor, up: Tensor, scale: float, start: Start) -> None:
        """Fill both factors in place, for an update `scale * up @ down`."""
