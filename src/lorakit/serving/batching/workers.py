"""The OpenMP threads of whoever builds an engine or loads an adapter, which would send the engine's own to sleep.

torch gives each thread of Python that computes a pool of OpenMP threads. GNU's OpenMP counts those of all pools: where
they are more than the processors it takes them for a crowd, and one that waits goes to sleep at once. A decode step has
a hundred small products and waits after each, so waking up takes longer than the products (docs/results/serving.md).
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import cache
from typing import Any

from lorakit.kernels.compiled import openmp

_SOFT = 1  # omp_pause_soft


def release_workers() -> bool:
    """End the OpenMP threads of the calling thread, which makes new ones when it computes; return whether it could."""
    library = _library()
    return library is not None and library.omp_pause_resource_all(_SOFT) == 0


@cache
def _library() -> Any:
    """Return the GNU OpenMP that torch brought, or None where it brought another or none."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(str(openmp()))
        assert library.omp_pause_resource_all
        return library
    return None
