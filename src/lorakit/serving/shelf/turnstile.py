"""One holder at a time, or many that share, over threads and processes: a lock on a file, freed with its holder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def one_at_a_time(file: Path, *, wait: bool = True, shared: bool = False) -> Iterator[bool]:
    """Hold the lock on `file`, which is made if missing; without waiting, yield whether it was free.

    Many may hold it `shared` at once, and nobody beside them holds it alone.

    Raises:
        OSError: a place that cannot be written.
    """
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield _locked(handle, wait, shared)
    finally:
        os.close(handle)


def _locked(handle: int, wait: bool, shared: bool) -> bool:
    with suppress(ImportError):  # a system without such locks has one process on each file
        import fcntl

        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
    return True
