"""A model hub that cannot be reached is asked once, and quietly.

Its client tries for half a minute a file and says so at every try, where the user has only misspelt the name of a file.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from lorakit.core.lazy import need

SECONDS = 3  # to wait for an answer of any kind


@contextmanager
def hub_at_hand() -> Iterator[None]:
    """Keep to what is cached inside the block where the hub cannot be reached (a proxy is left to the client)."""
    holders: list[Any] = [need("huggingface_hub.constants", "train")]
    if "datasets" in sys.modules:
        holders.append(need("datasets.config", "train"))
    before = [holder.HF_HUB_OFFLINE for holder in holders]
    if not before[0] and not getproxies() and not _reachable(holders[0].ENDPOINT):
        for holder in holders:
            holder.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for holder, value in zip(holders, before, strict=True):
            holder.HF_HUB_OFFLINE = value


def _reachable(address: str) -> bool:
    where = urlsplit(address)
    try:
        socket.create_connection((where.hostname or "", where.port or 443), timeout=SECONDS).close()
    except OSError:
        return False
    return True
