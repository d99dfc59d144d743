"""Norms with frozen gains that keep their input alone, and tell how their output is made again.

    RMSNorm    y = w * x / sqrt(mean(x^2) + eps)                arXiv 1910.07467, eq. 4
    LayerNorm  y = w * (x - mean(x)) / sqrt(var(x) + eps) + b   arXiv 1607.06450

Written out in torch, an RMSNorm of 16-bit values keeps a wide copy of its input.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.kernels.remade import remember


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, from_one: bool = False) -> Tensor:
    """Return the RMSNorm of the last dimension, computed in fp32 or wider.

    With `from_one` the gain is `1 + weight`, and the result is rounded once (Gemma); else `x / rms` is rounded to the
    dtype of x before the gain is applied (Llama).
    """
    y, factor = _RMSNorm.apply(x, weight, eps, from_one)  # type: ignore[no-untyped-call]
    return remember(y, partial(_scaled, from_one=from_one), x, factor, weight)


def layer_norm(x: Tensor, width: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return torch's LayerNorm, which keeps its input alone already."""
    return remember(F.layer_norm(x, width, weight, bias, eps), lambda t: F.layer_norm(t, width, weight, bias, eps), x)


def _scaled(x: Tensor, factor: Tensor, weight: Tensor, *, from_one: bool) -> Tensor:
    """Return `weight * (x * factor)`."""
    if from_one:
        return (x * factor).mul_(1.0 + weight.to(factor.dtype)).to(x.dtype)
    return (x * factor).to(x.dtype).mul_(weight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, from_one: bool) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        factor = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.from_one = from_one
        ctx.mark_non_differentiable(factor)
        ctx.save_for_backward(x, factor, weight)
        return _scaled(x, factor, weight, from_one=from_one), factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        x, factor, weight = ctx.saved_tensors
        gain = 1.0 + weight.to(factor.dtype) if ctx.from_one else weight
        pull = (upstream * gain).to(factor.dtype)
        along = torch.linalg.vecdot(pull, x.to(pull.dtype)).unsqueeze(-1)
        along.mul_(factor.square() / -x.shape[-1])
        return torch.addcmul(pull, x, along).mul_(factor).to(x.dtype), None, None, None
