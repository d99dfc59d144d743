"""What is lost where one update stands for another: beside its size, and of all updates as of one long vector."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Loss:
    """What an approximation leaves out of one update: `|dW - B A|_F`, beside `|dW|_F`."""

    error: float
    size: float

    @property
    def relative(self) -> float:
        """Return the error as a share of dW; of a dW of 0, 0 where there is no error and infinity where there is."""
        return self.error / self.size if self.size else math.inf if self.error else 0.0


def total(losses: Mapping[str, Loss]) -> float:
    """Return the relative error of all updates together, as of one long vector."""
    error, size = (math.hypot(*(getattr(x, name) for x in losses.values())) for name in ("error", "size"))
    return Loss(error, size).relative
