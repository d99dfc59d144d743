"""bitsandbytes' kernels, where the package is installed; it is imported at the first use of a quantised weight."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from jaxtyping import Float
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
    def unpack(packed: Tensor, absmax: Tensor, block_size: int, kind: str, out: Float[Tensor, "rows width"]) -> None:
        """Dequantise whole blocks into `out`, whose rows are whole blocks too.

        Where they are not, the kernel misplaces scales: it counts blocks from the start of each row.
        """
        if out.device.type == "cuda":
            torch.ops.bitsandbytes.dequantize_4bit.out(packed, absmax, block_size, kind, out.shape, out.dtype, out=out)
        elif function := _cpu_unpack(kind, out.dtype):  # its operator has no `out`, and makes a new tensor each time
            places = (ctypes.c_void_p(t.data_ptr()) for t in (packed, absmax, out))
            function(*places, *map(ctypes.c_longlong, (block_size, *out.shape)))
        else:
            found = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, block_size, kind, out.shape, out.dtype)
            out.copy_(found)

    @staticmethod
    def look_up(codes: Tensor, absmax: Tensor, book: Tensor, block_size: int) -> Tensor:
        """Return `book[code] * absmax` of each block of 8-bit codes, in fp32."""
        found: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax, book, block_size, torch.float32)
        return found


@cache
def _cpu_unpack(kind: str, dtype: torch.dtype) -> Callable[..., None] | None:
    """Return the C function behind the operator on a CPU, or None in a version that calls it otherwise."""
    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    library = getattr(importlib.import_module("bitsandbytes.cextension"), "lib", None)
    return getattr(library, f"cdequantize_blockwise_cpu_{kind}_{short[dtype]}", None)


@cache
def kernels() -> type[Kernels] | None:
    """Return bitsandbytes' kernels, or None where it is not installed."""
    return None if bitsandbytes() is None else Kernels
