"""bitsandbytes' kernels, where the package is installed; it is imported at the first use of a quantised weight."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor


@cache
def bitsandbytes() -> ModuleType | None:
    """Return the package, or None where it is not installed or does not work here."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    noisy = logging.getLogger("bitsandbytes")
    level, noisy.level = noisy.level, logging.ERROR  # it tells of kernels it could fetch from the network
    try:
        return importlib.import_module("bitsandbytes")
    except Exception:  # a library that does not fit this torch or driver raises anything
        return None
    finally:
        noisy.level = level


class Kernels:
    """What of bitsandbytes lorakit calls: functions of tensors, the same bits as the plain twins in `nf4`."""

    @staticmethod
    def unpack(
        packed: Tensor, absmax: Tensor, block_size: int, kind: str, dtype: torch.dtype, shape: tuple[int, int]
    ) -> Tensor:
        """Return whole blocks dequantised; the rows of `shape` are whole blocks too.

        Where they are not, the kernel misplaces scales: it counts blocks from the start of each row.
        """
        found: Tensor = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, block_size, kind, shape, dtype)
        return found.view(-1)

    @staticmethod
    def look_up(codes: Tensor, absmax: Tensor, book: Tensor, block_size: int) -> Tensor:
        """Return `book[code] * absmax` of each block of 8-bit codes, in fp32."""
        found: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax, book, block_size, torch.float32)
        return found


@cache
def kernels() -> type[Kernels] | None:
    """Return bitsandbytes' kernels, or None where it is not installed."""
    return None if bitsandbytes() is None else Kernels
