"""EVA: start on the directions the layer's inputs vary in most (arXiv 2410.07170).

A holds the r leading right singular vectors of the inputs X, so `A A^T = I` and no rank-r projection keeps more of X;
B = 0. They are the leading eigenvectors of the second moment `X^T X`, which is what is gathered. The inputs are not
centred (section 3; PEFT centres them), and every layer keeps the rank it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorakit.core.init import Init, Need
from lorakit.core.method import WEIGHT_KINDS, Start


@dataclass(frozen=True)
class Eva(Init):
    """Start at dW = 0 with the r leading right singular vectors of the layer's inputs as the rows of A."""

    name: ClassVar[str] = "eva"
    paper: ClassVar[str] = "arXiv 2410.07170"
    needs: ClassVar[Need | None] = "inputs"
    kinds: ClassVar[frozenset[str]] = WEIGHT_KINDS - {"embedding"}  # the inputs of a table are row numbers

    def fill(self, down: Tensor, up: Tensor, scale: float, start: Start) -> None:
        """Take the eigenvectors of the largest eigenvalues, the largest first."""
        assert start.evidence is not None
        n = start.site.fan_in
        wide = torch.promote_types(start.evidence.dtype, torch.float32)
        moment = start.evidence.reshape(-1, n, n).to(start.weight.device, wide)
        vectors = torch.linalg.eigh(moment).eigenvectors  # columns, the smallest first
        down.copy_(vectors.flip(-1)[..., : up.shape[1]].mT.reshape(down.shape))
        nn.init.zeros_(up)
