"""The percentiles that latencies are told by."""

from __future__ import annotations

from collections.abc import Sequence


def percentiles(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the median and the 95th percentile, each one of the values (nearest rank), or None of nothing."""
    if not values:
        return None
    ordered, count = sorted(values), len(values)
    return ordered[(count - 1) // 2], ordered[-(-95 * count // 100) - 1]
