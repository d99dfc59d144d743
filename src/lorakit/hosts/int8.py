"""Weights in 8 bits with one scale a row, as LLM.int8 keeps them (arXiv 2208.07339, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from lorakit.errors import SpecError

_STEP = 1 / 127


@dataclass(frozen=True, eq=False)
class RowScaled:
    """`weight = codes * absmax / 127`, row by row."""

    codes: Int8[Tensor, "out in"]
    absmax: Float[Tensor, out]
    dtype: torch.dtype
    """Of the weight that was quantised, and so of what `dequantize` gives back."""


@torch.no_grad()
def quantize(weight: Tensor) -> RowScaled:
    """Return `round(127 w / absmax)` of each row, with bitsandbytes' bytes; a row of zeros keeps absmax 0.

    Raises:
        SpecError: not a matrix, NaN or infinite values.
    """
    if weight.dim() != 2:
        raise SpecError(f"8 bits are kept by row, and a weight of shape {tuple(weight.shape)} is no matrix")
    absmax = weight.abs().amax(1).float()
    if not absmax.isfinite().all():
        bad = int((~weight.isfinite()).sum())
        raise SpecError(f"{bad:,} of {weight.numel():,} weights are NaN or infinite; quantise a sound checkpoint")
    scaled = weight * (127.0 / absmax.unsqueeze(1))
    return RowScaled(scaled.nan_to_num(0.0).round().to(torch.int8), absmax, weight.dtype)


@torch.no_grad()
def dequantize(value: RowScaled, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
    """Return the weight, in fp32 and rounded once to `dtype` (its own if None)."""
    return (value.codes * value.absmax.unsqueeze(1) * _STEP).to(dtype or value.dtype)
