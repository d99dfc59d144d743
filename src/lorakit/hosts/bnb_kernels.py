"""bitsandbytes' kernels, where the package is installed; it is imported at the first use of a quantised weight."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

Unpacker = Callable[[Tensor, Tensor, int, str, torch.dtype], Tensor]


@cache
def bitsandbytes() -> ModuleType | None:
    """Return the package, or None where it is not installed or does not work here."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    noisy = logging.getLogger("bitsandbytes")
    level, noisy.level = noisy.level, logging.ERROR  # it tells of kernels it could fetch from the network
    try:
        import bitsandbytes as package
    except Exception:  # a library that does not fit this torch or driver raises anything
        return None
    finally:
        noisy.level = level
    return package


@cache
def unpacker() -> Unpacker | None:
    """Return bitsandbytes' dequantisation of whole blocks, `(packed, absmax, block_size, kind, dtype)`, or None."""
    if bitsandbytes() is None:
        return None

    def unpack(packed: Tensor, absmax: Tensor, block_size: int, kind: str, dtype: torch.dtype) -> Tensor:
        shape = (absmax.numel(), block_size)  # a row a block: the kernel misplaces the scales of longer, uneven rows
        found: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            packed.reshape(-1, 1), absmax.contiguous(), block_size, kind, shape, dtype
        )
        return found.view(-1)

    return unpack
