"""Houlsby's adapters: a bottleneck behind attention and one behind the MLP of every block, and the norms trained.

`h <- h + W_up f(W_down h + b1) + b2` (arXiv 1902.00751, section 2.1) on the output of each sublayer, inside its
residual. AdapterDrop (arXiv 2010.11918) is a target in upper layers, such as `layers: 5-11`: below, nothing is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lorakit.methods.bottleneck import TwoProjections


@dataclass(frozen=True)
class Houlsby(TwoProjections):
    """Put a bottleneck behind attention and behind the MLP, and train the norms."""

    activation: str = "swish"

    name: ClassVar[str] = "houlsby"
    paper: ClassVar[str] = "arXiv 1902.00751"
    targets: ClassVar[Sequence[str]] = ("attention-out", "mlp-out")
    train: ClassVar[Sequence[str]] = "norms"
