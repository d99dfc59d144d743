"""OLoRA: start on an orthonormal basis of the weight's first columns (arXiv 2406.01775).

`W = Q R`, `B0 = Q[:, :r]` with `B0^T B0 = I`, `A0 = R[:r]`; the order of W's columns matters, for nothing is pivoted.
The paper freezes `W - s B0 A0`; here the base stays and the pair subtracts its start. PEFT factors the weight as it is
stored, so GPT-2's Conv1D gets the factors of W^T, which crash or silently change the output; here W is canonical.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorakit.core.init import Init, by_group
from lorakit.core.method import Start


@dataclass(frozen=True)
class OLoRA(Init):
    """Start on the first r columns of Q and rows of R of the QR decomposition of W."""

    name: ClassVar[str] = "olora"
    paper: ClassVar[str] = "arXiv 2406.01775"
    starts_at_zero: ClassVar[bool] = False
    keeps_start: ClassVar[bool] = True

    def fill(self, down: Tensor, up: Tensor, scale: float, start: Start) -> None:
        """Take the leading part of the decomposition."""
        weight = by_group(start.site, start.weight)
        q, r = torch.linalg.qr(weight.to(torch.promote_types(weight.dtype, torch.float32)))
        rank = up.shape[1]
        up.copy_(q[..., :rank].reshape(up.shape))
        down.copy_(r[..., :rank, :].reshape(down.shape))
