"""Pfeiffer's adapter: one bottleneck behind the MLP of every block, half of Houlsby's.

`h <- h + W_up f(W_down h + b1) + b2` on the MLP's output. In arXiv 2005.00247 it lies behind the residual and the norm,
and what it gives is added before the norm once more: no term of one layer is that, so here it reads what the MLP gives
(`original_ln_before: False` in the package `adapters`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lorakit.methods.bottleneck import TwoProjections


@dataclass(frozen=True)
class Pfeiffer(TwoProjections):
    """Put a bottleneck behind the MLP alone."""

    name: ClassVar[str] = "pfeiffer"
    paper: ClassVar[str] = "arXiv 2005.00247"
    targets: ClassVar[Sequence[str]] = "mlp-out"
