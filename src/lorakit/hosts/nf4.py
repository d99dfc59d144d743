"""Weights in 4 bits, in pure torch, with the bytes bitsandbytes makes on a CPU (arXiv 2305.14314, section 3).

A weight is flattened row by row and cut into blocks; a block keeps its largest magnitude (absmax) in fp32, and of each
value `w / absmax` the nearest of 16 values, two codes a byte, the first in the high half. Double quantisation keeps
the absmax of 256 blocks, less their mean over the whole weight, as one fp32 and 256 codes of the 8-bit dynamic map.
With blocks of 64 that is 4.5 bits a weight, and 4.127 double quantised.

The last block may be short, an odd number of weights pads half a byte, and an all-zero block has absmax 0. Work goes
in chunks that stay in the processor's cache, several times faster than one pass over the whole for each operation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lorakit.errors import SpecError
from lorakit.hosts.bnb_kernels import Kernels, kernels
from lorakit.hosts.codebooks import BOOKS, dynamic_map, pairs

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED = 256
"""Block maxima that share one fp32 when they are quantised themselves."""
CHUNK = 2**17
"""Values that are worked on at once: their temporaries fit a second-level cache."""
SLOW_KERNEL = 2048
"""Blocks from this size on are inexact in bitsandbytes' AVX-512 kernel, which goes around it too."""
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SMALLEST = 1e-38
"""No block is divided by less."""
_CELLS = 64


@dataclass(frozen=True, eq=False)
class Nested:
    """How the block maxima are kept when they are quantised too: `map[code] * absmax[i // 256] + offset`."""

    absmax: Float[Tensor, groups]
    offset: Float[Tensor, ""]


@dataclass(frozen=True, eq=False)
class Quantized:
    """A weight in 4 bits: `packed (numel / 2, 1)` uint8, and the state that gives the bytes a meaning."""

    packed: Tensor
    absmax: Tensor
    """fp32, a value a block; uint8 codes of the dynamic map if `nested`."""
    nested: Nested | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of the weight that was quantised, and so of what `dequantize` gives back."""
    block_size: int = 64
    kind: str = "nf4"

    @property
    def bits_per_weight(self) -> float:
        """Return the bits kept for each weight, all tensors of the state counted but the code books."""
        state = [self.absmax] + ([self.nested.absmax, self.nested.offset] if self.nested else [])
        return 8 * sum(t.numel() * t.element_size() for t in (self.packed, *state)) / prod(self.shape)

    def to(self, device: torch.device | str) -> Quantized:
        """Return it on another device."""
        nested = self.nested and Nested(self.nested.absmax.to(device), self.nested.offset.to(device))
        return replace(self, packed=self.packed.to(device), absmax=self.absmax.to(device), nested=nested)


@torch.no_grad()
def quantize(weight: Tensor, block_size: int = 64, double_quant: bool = True, kind: str = "nf4") -> Quantized:
    """Return `weight` in 4 bits.

    Args:
        weight: fp32, bf16 or fp16, of any shape.
        block_size: weights that share an absmax, a power of two from 32 to 4096.
        double_quant: keep the absmax in 8 bits as well.
        kind: `nf4`, or `fp4`.

    Raises:
        SpecError: an unknown kind, block size or dtype; NaN or infinite values, which would spoil their whole block.
    """
    _check(weight, block_size, kind)
    flat = weight.detach().reshape(-1)
    n = flat.numel()
    codes = torch.empty(n + n % 2, dtype=torch.uint8, device=flat.device)
    codes[n:] = _zero(kind)
    absmax = torch.empty(-(-n // block_size), device=flat.device, dtype=torch.float32)
    whole = n - n % block_size
    chunk = CHUNK if flat.device.type == "cpu" else 128 * CHUNK  # elsewhere a launch costs more than a cache
    for start in range(0, whole, chunk):
        stop = min(start + chunk, whole)
        blocks = flat[start:stop].float().view(-1, block_size)
        most = _finite(blocks.abs().amax(1), flat)
        absmax[start // block_size : stop // block_size] = most
        scaled = (blocks * (1.0 / most.clamp(min=_SMALLEST)).unsqueeze(1)).clamp_(-1, 1)
        codes[start:stop] = _nearest(scaled.view(-1), kind)
    if whole < n:
        tail = flat[whole:].float()
        absmax[-1] = _finite(tail.abs().max(), flat).clamp(min=_SMALLEST)
        codes[whole:n] = _nearest((tail / absmax[-1]).clamp(-1, 1), kind)
    packed = ((codes[::2] << 4) | codes[1::2]).unsqueeze(1)
    shape = tuple(weight.shape)
    if not double_quant:
        return Quantized(packed, absmax, None, shape, weight.dtype, block_size, kind)
    offset = absmax.mean()
    if not offset.isfinite():
        raise SpecError("weights this large overflow the mean of their block maxima; set double_quant to false")
    inner, most = _quantize_maxima(absmax - offset)
    return Quantized(packed, inner, Nested(most, offset), shape, weight.dtype, block_size, kind)


def hollow(
    shape: tuple[int, ...], dtype: torch.dtype, block_size: int = 64, double_quant: bool = True, kind: str = "nf4"
) -> Quantized:
    """Return a weight of that shape whose bytes mean nothing yet, on the default device."""
    n = prod(shape)
    blocks = -(-n // block_size)
    packed = torch.empty(-(-n // 2), 1, dtype=torch.uint8)
    absmax = torch.empty(blocks, dtype=torch.uint8 if double_quant else torch.float32)
    nested = Nested(torch.empty(-(-blocks // NESTED)), torch.empty(())) if double_quant else None
    return Quantized(packed, absmax, nested, shape, dtype, block_size, kind)


def dequantize(value: Quantized, dtype: torch.dtype | None = None) -> Tensor:
    """Return the weight as it was shaped, `book[code] * absmax` in fp32, rounded once to `dtype` (its own if None)."""
    out = torch.empty(value.shape, dtype=dtype or value.dtype, device=value.packed.device)
    unpack(value, 0, out.view(-1))
    return out


def unpack(value: Quantized, start: int, out: Float[Tensor, n]) -> None:
    """Fill `out` with the flat weight from `start` on, a multiple of the block size.

    Whole blocks go through bitsandbytes' kernel where it is installed: the same bits, two to four times faster than
    torch alone.
    """
    size, count, stop = value.block_size, out.numel(), start + out.numel()
    scales = maxima(value, start // size, -(-stop // size))
    if size < SLOW_KERNEL and not count % size and out.dtype in KERNEL_DTYPES and (kernel := _kernels(value)):
        width = value.shape[-1]  # rows of several blocks are read a little faster than one block a row
        width = size if width % size or count % width else width
        packed = value.packed if 2 * value.packed.shape[0] == count else value.packed[start // 2 : stop // 2]
        kernel.unpack(packed, scales, size, value.kind, out.view(-1, width))
        return
    for here in range(start, stop, CHUNK):
        upto = min(here + CHUNK, stop)
        unpack_plain(value, here, upto, scales[(here - start) // size :], out[here - start : upto - start])


def _kernels(value: Quantized) -> type[Kernels] | None:
    return kernels() if value.packed.device.type in ("cpu", "cuda") else None


def unpack_plain(value: Quantized, start: int, stop: int, scales: Float[Tensor, blocks], out: Tensor) -> None:
    """Write one chunk of the flat weight into `out`: a gather of two values a byte, then a product for each block."""
    n, size = stop - start, value.block_size
    index = value.packed.view(-1)[start // 2 : (stop + 1) // 2].to(torch.int32)
    direct = out.dtype == torch.float32 and n % 2 == 0
    values = out if direct else torch.empty(n + n % 2, dtype=torch.float32, device=out.device)
    torch.index_select(pairs(value.kind, out.device), 0, index, out=values.view(torch.int64))
    whole = n - n % size
    values[:whole].view(-1, size).mul_(scales[: whole // size].unsqueeze(1))
    values[whole:n].mul_(scales[whole // size : whole // size + 1])
    if not direct:
        out.copy_(values[:n])


def maxima(value: Quantized, start: int = 0, stop: int | None = None) -> Float[Tensor, blocks]:
    """Return the absmax of blocks `start` to `stop` in fp32."""
    codes, nested = value.absmax, value.nested
    stop = codes.numel() if stop is None else stop
    if nested is None:
        return codes[start:stop]
    book, groups, skipped = _dynamic_map(codes.device), nested.absmax, start % NESTED
    if stop - start < codes.numel():
        groups = groups[start // NESTED : -(-stop // NESTED)]
        codes = codes[start - skipped : stop]
    if kernel := _kernels(value):
        absmax = kernel.look_up(codes, groups, book, NESTED).add_(nested.offset)
    else:
        absmax = torch.empty(groups.numel() * NESTED, dtype=torch.float32, device=codes.device)
        torch.index_select(book, 0, codes.to(torch.int32), out=absmax[: codes.numel()])
        absmax.view(-1, NESTED).mul_(groups.unsqueeze(1)).add_(nested.offset)
        absmax = absmax[: codes.numel()]
    return absmax[skipped:] if skipped else absmax


@cache
def _dynamic_map(device: torch.device) -> Tensor:
    return dynamic_map().to(device)


@dataclass(frozen=True)
class QuantizationError:
    """What 4 bits lost of a weight W: `|W - Q|_F` of `|W|_F`, the largest single difference, and the bits left."""

    lost: float
    norm: float
    largest: float
    bits_per_weight: float

    @property
    def relative(self) -> float:
        """Return `|W - Q|_F / |W|_F`; 0 for a weight of zeros."""
        return self.lost / self.norm if self.norm else 0.0


@torch.no_grad()
def error(weight: Tensor, value: Quantized) -> QuantizationError:
    """Return how far `value` is from the weight it was made of, in fp32."""
    wide = weight.float()
    lost = wide - dequantize(value, torch.float32)
    return QuantizationError(float(lost.norm()), float(wide.norm()), float(lost.abs().max()), value.bits_per_weight)


def _check(weight: Tensor, block_size: int, kind: str) -> None:
    if kind not in BOOKS:
        raise SpecError(f"unknown 4-bit kind {kind!r}; one of {', '.join(BOOKS)}")
    if block_size not in BLOCK_SIZES:
        raise SpecError(f"block size {block_size} is none of {', '.join(map(str, BLOCK_SIZES))}")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise SpecError(f"only fp32, bf16 and fp16 weights can be quantised, not {weight.dtype}")
    if not weight.numel():
        raise SpecError("a weight without values cannot be quantised")


def _finite(maxima: Tensor, flat: Tensor) -> Tensor:
    """Return the maxima, or raise `SpecError` that counts what is not a number among the weights."""
    if not maxima.isfinite().all():
        bad = int((~flat.isfinite()).sum())
        raise SpecError(f"{bad:,} of {flat.numel():,} weights are NaN or infinite; quantise a sound checkpoint")
    return maxima


def _nearest(scaled: Float[Tensor, n], kind: str) -> Tensor:
    """Return the code of the value nearest to each of `scaled`, in [-1, 1]; the lower one of two that are as near.

    The line is cut into cells with at most one border between two codes in each: the cell gives the code below the
    border and the border itself. Where a book is too fine for that, the borders are searched.
    """
    below, border, order, borders = _cells(kind, scaled.device)
    if border is None:
        return order[torch.bucketize(scaled, borders, out_int32=True)]
    cell = ((scaled + 1.0) * (_CELLS / 2)).to(torch.int32)
    return below.index_select(0, cell).add_(scaled > border.index_select(0, cell))


@cache
def _cells(kind: str, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return, by cell, the lowest code and the border to the next (None if a cell has two); codes and borders in order.

    A cell is taken a little wider than it is, so that rounding cannot put a value into one that does not know it.
    """
    book = BOOKS[kind]()
    order = torch.argsort(book, stable=True)
    borders = (book[order[:-1]] + book[order[1:]]) / 2
    edges = torch.linspace(-1, 1, _CELLS + 1, dtype=torch.float64, device="cpu")
    low, high = edges - 1e-6, torch.cat([edges[1:], edges[-1:]]) + 1e-6
    first, last = torch.bucketize(low, borders.double()), torch.bucketize(high, borders.double())
    codes = order.to(torch.uint8)
    single = bool((last - first).max() <= 1) and torch.equal(order, torch.arange(16, device="cpu"))
    border = torch.cat([borders, borders.new_tensor([torch.inf])])[first].to(device) if single else None
    return codes[first].to(device), border, codes.to(device), borders.to(device)


def _zero(kind: str) -> int:
    """Return the code that an odd number of weights is filled up with: that of 0."""
    return int(_nearest(torch.zeros(1, device="cpu"), kind))


def _quantize_maxima(values: Float[Tensor, blocks]) -> tuple[Tensor, Float[Tensor, groups]]:
    """Return 8-bit codes of the block maxima less their mean, and the fp32 absmax of each group of 256.

    The code is that of the nearest of 65,536 evenly spaced points on [-1, 1], as on bitsandbytes' CPU; its CUDA kernel
    takes the nearest value of the map itself, which differs for 1 value in 2,000 or so.
    """
    n = values.numel()
    grouped = F.pad(values, (0, -n % NESTED)).view(-1, NESTED)
    most = grouped.abs().amax(1)
    scaled = (grouped * (1.0 / most).unsqueeze(1)).clamp_(-1, 1)
    points = ((scaled + 1.0) * 0.5 * 65535.0 + 0.5).nan_to_num(0.0).to(torch.int64)  # 0 * (1 / 0): equal maxima
    return _points(values.device)[points].view(-1)[:n], most


@cache
def _points(device: torch.device) -> Tensor:
    """Return the code of the dynamic map nearest to each of 65,536 points from -1 to 1."""
    book = dynamic_map().double()
    points = -1 + 2 * torch.arange(65536, dtype=torch.float64, device="cpu") / 65535
    return torch.bucketize(points, (book[:-1] + book[1:]) / 2).to(torch.uint8).to(device)
