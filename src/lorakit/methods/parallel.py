"""The parallel adapter: a scaled bottleneck beside the whole MLP of every block, reading what the MLP reads.

`h <- h + s (W_up f(W_down x + b1) + b2)` (arXiv 2110.04366, table 1), with x the input and h the output of the
module; it works beside one linear layer as well. In models that normalise before the MLP x is normalised; the package
`adapters` 1.3 reads the stream before that norm. Families whose MLP is no module of its own (BERT, OPT) have no place
for it: there one layer reads x and another gives h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lorakit.core.checks import check_positive
from lorakit.core.method import Call, Tensors
from lorakit.methods.bottleneck import TwoProjections


@dataclass(frozen=True)
class Parallel(TwoProjections):
    """Put a scaled bottleneck beside the whole MLP."""

    reduction: float = 2
    scale: float = 4.0

    name: ClassVar[str] = "parallel"
    paper: ClassVar[str] = "arXiv 2110.04366"
    formula: ClassVar[str] = "h <- h + s (W_up f(W_down x + b1) + b2), s = scale"
    count: ClassVar[str] = "(m + n + 1) * round(m / reduction) + m"
    targets: ClassVar[Sequence[str]] = "mlp-module"
    reads: ClassVar[Literal["input", "output"]] = "input"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("scale", self.scale, hint="; the usual one is 4")

    def branch(self, p: Tensors, call: Call) -> Tensor:
        """Return the scaled bottleneck of the input."""
        return self.scale * self.through(p, call.x)
