"""Who is served next: the tenant who has had least, and of theirs the adapter that has had least.

Every tenant has a counter of the tokens served to it, and within a tenant every adapter (the virtual token counter of
Sheng et al., "Fairness in Serving Large Language Models", arXiv 2401.00588, algorithm 1, on two levels). Whoever has
had nothing to do comes back at the level of those who have, so idleness earns no arrears. As every served token raises
the counter of the one who got it, nobody waits for ever, however hot another adapter is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items that wait, by tenant and adapter."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[str | None, deque[T]]] = {}
        self._tenants: dict[str, float] = {}
        self._adapters: dict[tuple[str, str | None], float] = {}
        self._left: tuple[str, str | None] | None = None  # served last: the level of who finds nobody waiting

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[T]:
        for lines in self._waiting.values():
            for line in lines.values():
                yield from line

    def waiting(self) -> dict[str | None, int]:
        """Return how many wait for each adapter."""
        found: dict[str | None, int] = {}
        for lines in self._waiting.values():
            for adapter, line in lines.items():
                found[adapter] = found.get(adapter, 0) + len(line)
        return found

    def push(self, item: T, tenant: str, adapter: str | None, *, first: bool = False) -> None:
        """Let an item wait behind those of its tenant and adapter, or before them."""
        left = [] if self._left is None else [self._left]
        if tenant not in self._waiting:
            self._lift(self._tenants, tenant, list(self._waiting) or [last for last, _ in left])
        lines = self._waiting.setdefault(tenant, {})
        if adapter not in lines:
            others = [(tenant, other) for other in lines] or [pair for pair in left if pair[0] == tenant]
            self._lift(self._adapters, (tenant, adapter), others)
        line = lines.setdefault(adapter, deque())
        line.appendleft(item) if first else line.append(item)

    def pop(self) -> T | None:
        """Return the next item, or None where none waits."""
        if not self._waiting:
            return None
        tenant = min(self._waiting, key=lambda t: self._tenants[t])
        lines = self._waiting[tenant]
        adapter = min(lines, key=lambda a: self._adapters[tenant, a])
        item = lines[adapter].popleft()
        self._left = tenant, adapter
        self._tidy(tenant, adapter)
        return item

    def remove(self, item: T) -> bool:
        """Take an item out, and return whether it was there."""
        for tenant, lines in self._waiting.items():
            for adapter, line in lines.items():
                if item in line:
                    line.remove(item)
                    self._tidy(tenant, adapter)
                    return True
        return False

    def full(self, tenant: str, most: int) -> bool:
        """Return whether nothing more of a tenant's may wait: `most` wait, and of them it has its share."""
        if len(self) < most:
            return False
        own = sum(map(len, self._waiting.get(tenant, {}).values()))
        return own >= max(1, most // len(self._waiting.keys() | {tenant}))

    def charge(self, tenant: str, adapter: str | None, tokens: float) -> None:
        """Count tokens served."""
        self._tenants[tenant] = self._tenants.get(tenant, 0.0) + tokens
        self._adapters[tenant, adapter] = self._adapters.get((tenant, adapter), 0.0) + tokens

    def forget(self, running: set[tuple[str, str | None]]) -> None:
        """Drop the counters of those who neither wait nor run: they would come back lifted anyway."""
        if not (running or self._waiting):
            self._left = None
        waiting = {(tenant, adapter) for tenant, lines in self._waiting.items() for adapter in lines}
        busy = running | waiting | ({self._left} if self._left else set())
        tenants = {tenant for tenant, _ in busy}
        self._tenants = {t: n for t, n in self._tenants.items() if t in tenants}
        self._adapters = {k: n for k, n in self._adapters.items() if k in busy}

    @staticmethod
    def _lift(counters: dict[K, float], key: K, others: list[K]) -> None:
        """Raise a counter to the least of those who were waiting all the while, or that of who was served last."""
        least = min((counters.get(other, 0.0) for other in others), default=0.0)
        counters[key] = max(counters.get(key, 0.0), least)

    def _tidy(self, tenant: str, adapter: str | None) -> None:
        if not self._waiting[tenant][adapter]:
            del self._waiting[tenant][adapter]
        if not self._waiting[tenant]:
            del self._waiting[tenant]


K = TypeVar("K", bound="str | tuple[str, str | None]")
