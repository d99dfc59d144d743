"""Lin's adapter: one bottleneck behind every block, with a LayerNorm of its own before it.

`h <- h + W_up f(W_down LN(h) + b1) + b2` (arXiv 2004.03829) on the MLP's output, inside the residual, as
arXiv 2106.09685 places its Adapter^L. The paper's own h is the output of the whole block: name the blocks as targets
(`transformer.h.*`) where they give back a plain tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from lorakit.core.method import Call, Tensors
from lorakit.methods.bottleneck import TwoProjections, output


@dataclass(frozen=True)
class Lin(TwoProjections):
    """Put a bottleneck with a LayerNorm of its own behind the MLP."""

    name: ClassVar[str] = "lin"
    paper: ClassVar[str] = "arXiv 2004.03829"
    formula: ClassVar[str] = "h <- h + W_up f(W_down LN(h) + b1) + b2"
    count: ClassVar[str] = "(2 * m + 1) * round(m / reduction) + 3 * m"
    targets: ClassVar[Sequence[str]] = "mlp-out"
    normed: ClassVar[bool] = True

    def branch(self, p: Tensors, call: Call) -> Tensor:
        """Return the bottleneck of the normalised output."""
        h, gain, shift = output(call), call.kept["gain"], call.kept["shift"]
        return self.through(p, F.layer_norm(h.to(gain.dtype), h.shape[-1:], gain, shift).to(h.dtype))
