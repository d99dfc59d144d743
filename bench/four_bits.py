"""Is lorakit's 4-bit weight as fast as bitsandbytes' own on a CPU: quantise, dequantise, and a layer's two passes?

Each figure is a ratio, bitsandbytes' time over lorakit's (above 1: lorakit is faster), from runs taken in turn in one
process: the median of the pairs' ratios and their range. `plain` is lorakit where bitsandbytes is not installed.
Run: python bench/four_bits.py [--threads N]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import bitsandbytes
import bitsandbytes.functional as theirs
import torch
from record import record

from lorakit.hosts import nf4
from lorakit.hosts.linear4bit import product

SIZES, TOKENS, PAIRS = (1024, 2048, 4096), (16, 512), 15
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def seconds(run: Callable[[], object]) -> float:
    """Return how long one call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def paired(peer: Callable[[], object], own: Callable[[], object]) -> dict[str, float]:
    """Return the median and the range of peer's time over ours, and our median milliseconds."""
    seconds(peer), seconds(own)
    times = [(seconds(peer), seconds(own)) if i % 2 else (seconds(own), seconds(peer))[::-1] for i in range(PAIRS)]
    ratios = sorted(a / b for a, b in times)
    return {
        "ratio": round(statistics.median(ratios), 3),
        "lowest": round(ratios[0], 3),
        "highest": round(ratios[-1], 3),
        "own_ms": round(1e3 * statistics.median(b for _, b in times), 3),
    }


def plainly(run: Callable[[], object]) -> Callable[[], object]:
    """Return `run` as it is without bitsandbytes' kernel."""

    def without() -> object:
        kernels, nf4.kernels = nf4.kernels, lambda: None  # type: ignore[assignment]
        try:
            return run()
        finally:
            nf4.kernels = kernels  # type: ignore[assignment]

    return without


def measured(size: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return every figure of one square weight."""
    weight = (torch.randn(size, size) / size**0.5).to(dtype)
    packed, state = theirs.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    value = nf4.quantize(weight)
    assert torch.equal(value.packed, packed)
    runs: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
        (
            "quantise",
            lambda: theirs.quantize_4bit(weight, quant_type="nf4", compress_statistics=True),
            lambda: nf4.quantize(weight),
        ),
        ("dequantise", lambda: theirs.dequantize_4bit(packed, state), lambda: nf4.dequantize(value)),
    ]
    for tokens in TOKENS:
        x = torch.randn(tokens, size, dtype=dtype, requires_grad=True)
        dy = torch.randn(tokens, size, dtype=dtype)
        runs.append(
            (
                f"forward + backward, {tokens} tokens",
                lambda x=x, dy=dy: bitsandbytes.matmul_4bit(x, packed, state).backward(dy),  # type: ignore[misc]
                lambda x=x, dy=dy: product(x, value).backward(dy),  # type: ignore[misc]
            )
        )
    found = []
    for what, peer, own in runs:
        found.append({"what": what, "size": size, **paired(peer, own)})
        if what != "quantise":
            found.append({"what": f"{what}, plain", "size": size, **paired(peer, plainly(own))})
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    threads = options.parse_args().threads
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    found = {name: [row for size in SIZES for row in measured(size, dtype)] for name, dtype in DTYPES.items()}
    for name, rows in found.items():
        for row in rows:
            print(name, row)
    packages = ("torch", "bitsandbytes")
    record("four-bits", (__doc__ or "").splitlines()[0], packages, threads=threads, pairs=PAIRS, **found)


if __name__ == "__main__":
    main()
