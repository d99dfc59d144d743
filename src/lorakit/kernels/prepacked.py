"""A frozen weight kept in the blocks oneDNN multiplies in, so that no call has to rearrange it.

A product of few rows spends more time on bringing `W` into the processor's order than on multiplying: with weights
packed once, 16 sequences were decoded 1.5 times as fast (m768, `python bench/serving.py --parts generate`). The
operators are torch's own but not public, so `pack` proves them on the weight it is given and returns None where they
are missing, refuse or differ; `unpacked` gives back the very weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FEWEST = 1 << 15
"""Weights of fewer values are as fast unpacked, or faster."""
_linear: Any = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
"""One overload by itself, so that no call has to choose among them."""


@torch.no_grad()
def pack(weight: Tensor) -> Tensor | None:
    """Return `weight (out, in)` in oneDNN's blocks, or None where that does not pay or cannot be had."""
    if weight.device.type != "cpu" or weight.numel() < FEWEST or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)
        x = torch.linspace(-1, 1, 2 * weight.shape[1], dtype=weight.dtype).view(2, -1)
        size = F.linear(x.abs(), weight.abs()).max().item()
        near = (product(x, packed, None) - F.linear(x, weight)).abs().max().item()
        same = bool((packed.to_dense() == weight).all())
    except (RuntimeError, AttributeError, TypeError):
        return None
    rounding = 1e-5 if weight.dtype == torch.float32 else 2e-2
    return packed if same and near <= rounding * size else None


def product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x W^T + b`, as `F.linear`, with W as `pack` gave it."""
    made: Tensor = _linear(x, packed, bias, "none", [], "")
    return made


def unpacked(packed: Tensor) -> Tensor:
    """Return the weight that was packed: the inverse of `pack`."""
    return packed.to_dense()
