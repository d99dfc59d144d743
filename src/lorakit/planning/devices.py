"""Common devices: the memory a program finds on them, and how fast they can be at most.

Makers write "40 GB" and mean 40 GiB = 42.9e9 bytes, less what error correction and the driver keep: an L40S of
"48 GB" has 45.0 GiB. `memory` is therefore what the driver reports (nvidia-smi, rocm-smi), in bytes, and never the
number on the box. Throughput is dense, not with the 2:4 sparsity that data sheets print in larger letters, and in 16
bits with sums in fp32, for which GeForce cards take twice as long as for sums in fp16. Sources: docs/plan-memory.md.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from lorakit.errors import DeviceError, SpecError, did_you_mean

GB = 10**9
GIB = 2**30
_MIB = 2**20
_T = 10**12

OVERHEAD = 10**9
"""Bytes no tensor of ours is in: about 0.54 GB the driver keeps of what it reports (an A100's 40,960 MiB are 40,441 to
CUDA), 0.3 GB CUDA context with lazily loaded kernels (github.com/pytorch/pytorch/issues/107667; 1 GB before CUDA 11.7)
and up to 0.04 GB workspaces of cuBLAS, rounded up. Fragments of torch's allocator are not in it."""


@dataclass(frozen=True)
class Device:
    """A device: `memory` in bytes, dense throughput in FLOP/s (None: not supported, or not known), bandwidth in B/s."""

    name: str
    memory: int
    bf16: float | None = None
    fp16: float | None = None
    fp32: float | None = None
    bandwidth: float | None = None
    also: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    """Further words that may stand in its name."""

    @property
    def memory_gib(self) -> float:
        """Return the memory in GiB."""
        return self.memory / GIB

    def knows(self, dtype: str) -> bool:
        """Return whether a throughput in this dtype is known."""
        return getattr(self, dtype, None) is not None

    def peak(self, dtype: str) -> float:
        """Return the dense throughput in FLOP/s for "bf16", "fp16" or "fp32".

        Raises:
            SpecError: another dtype, or one this device has no fast units for.
        """
        speeds = {"bf16": self.bf16, "fp16": self.fp16, "fp32": self.fp32}
        if dtype not in speeds:
            raise SpecError(f"{dtype!r} is no dtype of a forecast; use one of {', '.join(speeds)}")
        if (speed := speeds[dtype]) is None:
            known = [name for name, value in speeds.items() if value is not None]
            what = f"use {' or '.join(known)}" if known else "measure a few steps on it instead"
            raise SpecError(f"{self.name}: no throughput is known in {dtype}; {what}")
        return speed

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return {key: value for key, value in asdict(self).items() if key != "also"}


def _row(name: str, mib: int, half: float, fp32: float, gb_per_s: int, also: str = "", bf16: bool = True) -> Device:
    """Return a device from MiB, TFLOP/s in 16 bits and in fp32, and GB/s."""
    speed = half * _T
    return Device(name, mib * _MIB, speed if bf16 else None, speed, fp32 * _T, gb_per_s * 1e9, frozenset(also.split()))


DEVICES = (
    _row("RTX 3060", 12288, 25.5, 12.7, 360, "12 12gb"),
    _row("RTX 3090", 24576, 71.2, 35.6, 936, "24 24gb"),
    _row("RTX 4090", 24564, 165.2, 82.6, 1008, "24 24gb"),
    _row("RTX 5090", 32607, 209.5, 104.8, 1792, "32 32gb"),
    _row("T4", 15360, 65, 8.1, 320, "16 16gb", bf16=False),
    _row("L4", 23034, 121, 30.3, 300, "24 24gb"),
    _row("L40S", 46068, 362, 91.6, 864, "48 48gb"),
    _row("A10", 23028, 125, 31.2, 600, "24 24gb"),
    _row("A100 40GB", 40960, 312, 19.5, 1555, "40 sxm sxm4 pcie"),
    _row("A100 80GB", 81920, 312, 19.5, 2039, "80 sxm sxm4"),
    _row("H100 80GB", 81559, 989, 67, 3350, "80 sxm sxm5 hbm3"),
    _row("H200 141GB", 143771, 989, 67, 4800, "141 sxm sxm5"),
    _row("B200", 183359, 2250, 75, 7700, "180 180gb 192 192gb sxm"),
    _row("MI300X", 196592, 1307, 163, 5300, "192 192gb oam"),
)
"""By the maker's name. A100, H100 and H200 are SXM modules; an H100 on a PCIe card has 76 % of the throughput."""

_NOISE = frozenset("nvidia geforce tesla amd instinct gpu".split())
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*(GB|GiB)")


def device(name: str) -> Device:
    """Return the device of this name, as its maker, torch or a user writes it, or one of an amount: "36 GiB", "24 GB".

    An amount is taken as it is written: GB are 10^9 bytes and GiB 2^30; its speed is not known.

    Raises:
        DeviceError: a name that fits no device, or more than one.
    """
    if (amount := _AMOUNT.fullmatch(name.strip())) and float(amount[1]):
        return Device(name.strip(), int(float(amount[1]) * (GB if amount[2] == "GB" else GIB)))
    asked = _words(name) - _NOISE
    found = [row for row in DEVICES if asked and asked <= _words(row.name) | row.also]
    if len(found) == 1:
        return found[0]
    if found:
        raise DeviceError(f"{name!r} may be {' or '.join(row.name for row in found)}; say which")
    known = [row.name for row in DEVICES]
    raise DeviceError(
        f"no device {name!r} is known{did_you_mean(name.upper(), known)}; known are {', '.join(known)}; "
        'for any other write its memory, as "36 GiB"'
    )


def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", re.sub(r"rtx(?=\d)", "rtx ", name.lower())))
