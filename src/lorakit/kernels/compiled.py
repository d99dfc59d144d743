"""What is worth C: compiled once for this processor where a C compiler is at hand; elsewhere torch does the same.

`rows.c` stands in for two batched products of torch in `grouped.rows`, whose calls cost as much as their work: a decode
step with 16 adapters of rank 8 spends 0.6 of the time on them that it does otherwise (docs/results/serving.md). The
library lies in the user's cache under the hash of all that it was made of, this processor included, and is believed
only once it gave torch's numbers. `LORAKIT_KERNELS=torch` does without.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import secrets
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("rows.c")
FLAGS = ("-O3", "-march=native", "-fPIC", "-shared", "-std=c99")
WORTH = 1 << 16
"""Values of factors that are worth a thread."""

_log = logging.getLogger(__name__)


def rows(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> bool:
    """Add `x_i down_i^T up_i` to each row of `y`, in place; return False, and do nothing, where it is not for this.

    It is for fp32 in the memory of the CPU, row after row, once `prepare` was called.
    """
    kernel, (n, rank, inputs), outputs = _ready, down.shape, up.shape[2]
    if (
        kernel is None
        or not x.dtype is y.dtype is up.dtype is torch.float32
        or not (x.is_cpu and x.is_contiguous() and y.is_contiguous())
        or down.stride()[1:] != (inputs, 1)
        or up.stride()[1:] != (outputs, 1)
        or x.numel() != n * inputs
        or y.numel() != n * outputs
    ):
        return False
    threads = min(torch.get_num_threads(), 1 + n * rank * (inputs + outputs) // WORTH)
    kernel(n, rank, inputs, outputs, x.data_ptr(), down.data_ptr(), down.stride(0), up.data_ptr(), up.stride(0),
           y.data_ptr(), threads)  # fmt: skip
    return True


def prepare() -> bool:
    """Compile, prove and load what is here, unless that was done; return whether it is used from now on."""
    global _ready
    _ready = _library()
    return _ready is not None


_ready: Any = None
"""The function of rows.c, once it is proved."""


@cache
def openmp() -> Path | None:
    """Return the file of the GNU OpenMP that torch brought, or None: a second one would have threads of its own."""
    return next(iter(sorted(Path(torch.__file__).with_name("lib").glob("libgomp*"))), None)


@cache
def _library() -> Any:
    if os.environ.get("LORAKIT_KERNELS") == "torch" or (compiler := _compiler()) is None:
        return None
    try:
        kernel = ctypes.PyDLL(str(_built(compiler))).lorakit_rows  # so short that it keeps Python's lock
        number, place = ctypes.c_long, ctypes.c_void_p
        kernel.argtypes = [number] * 4 + [place, place, number, place, number, place, number]
        kernel.restype = None
        _prove(kernel)
    except (OSError, AttributeError, RuntimeError, subprocess.SubprocessError, ArithmeticError) as failed:
        _log.info("rows.c is not used, torch does the same: %s", failed)
        return None
    return kernel


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")


def _built(compiler: str) -> Path:
    """Return the library, compiled now where the cache has none of this source, compiler and processor.

    Its own hash stands behind it, and a damaged one is compiled anew: loading what was cut off ends the process.
    """
    parallel = ["-fopenmp", str(openmp())] if openmp() is not None else ["-fopenmp-simd"]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    made_of = [SOURCE.read_bytes(), version, " ".join([*FLAGS, *parallel]).encode(), _processor().encode()]
    name = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:24]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakit" / "kernels"
    file = folder / f"rows-{name}.so"
    if not file.exists() or not _whole(file.read_bytes()):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = folder / f".{name}-{secrets.token_hex(4)}.so"
        try:
            subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(draft), *parallel], capture_output=True,
                           check=True, timeout=60)  # fmt: skip
            draft.write_bytes((made := draft.read_bytes()) + hashlib.sha256(made).digest())
            draft.replace(file)
        finally:
            draft.unlink(missing_ok=True)
    if file.stat().st_uid != os.getuid():
        raise OSError(f"{file} is somebody else's")
    return file


def _whole(library: bytes) -> bool:
    return hashlib.sha256(library[:-32]).digest() == library[-32:]


def _processor() -> str:
    """Return what code for this processor must not meet another one's without."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _prove(kernel: Any) -> None:
    """Raise `ArithmeticError` unless the function gives torch's numbers, of odd shapes and of any number of threads."""
    global _ready
    before, _ready = _ready, kernel
    try:
        for n, rank, inputs, outputs in ((1, 1, 1, 1), (3, 5, 37, 70), (16, 8, 256, 300)):
            down, up = (
                torch.linspace(-1, 1, n * 2 * rank * k).view(n, 2 * rank, k)[:, :rank] for k in (inputs, outputs)
            )
            x, y = torch.linspace(-2, 1, n * inputs).view(n, inputs), torch.linspace(0, 3, n * outputs).view(n, outputs)
            wanted = torch.baddbmm(y[:, None].double(), torch.bmm(x[:, None].double(), down.mT.double()), up.double())
            if not rows(y, x, down, up) or (y - wanted[:, 0]).abs().max() > 1e-5 * wanted.abs().max():
                raise ArithmeticError(f"other numbers than torch's for {n} rows of rank {rank}")
    finally:
        _ready = before
