"""How many servers many adapters take, as arithmetic: bytes, how often an adapter is in memory, and replicas.

Requests go to few of many adapters: the k-th most popular gets a share of 1 / k^s (Zipf). How often the memory of the
longest unused holds the one that is asked for follows from that (Che et al., "Hierarchical Web Caching Systems", IEEE
JSAC 20(7), 2002, eq. 3 and 4). docs/deployment.md shows what comes out; a test holds its table to these functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Widths:
    """What a decoder's seven linear layers a block are wide: queries and outputs are as wide as the model."""

    hidden: int
    keys: int
    inner: int
    layers: int


@dataclass(frozen=True)
class Need:
    """What a plan takes."""

    adapter_bytes: int
    store_bytes: int
    held: int
    """Adapters that the memory of one replica holds."""
    hit_rate: float
    """The share of requests whose adapter is there already."""
    loads_per_second: float
    """On each replica."""
    replicas: int


def adapter_bytes(widths: Widths, rank: int, bytes_per_number: int) -> int:
    """Return what a LoRA of every linear layer takes: `r (in + out)` numbers at each."""
    w = widths
    ends = 2 * (w.hidden + w.hidden) + 2 * (w.hidden + w.keys) + 3 * (w.hidden + w.inner)
    return w.layers * rank * ends * bytes_per_number


def popularity(adapters: int, exponent: float = 1.0) -> list[float]:
    """Return the share of the requests that each adapter gets, `1 / k^s` over their sum; 0 is an equal share."""
    weights = [k**-exponent for k in range(1, adapters + 1)]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def hit_rate(shares: Sequence[float], held: int) -> float:
    """Return how often a memory of `held` adapters, the longest unused gone first, has the one that is asked for.

    With T such that `sum 1 - exp(-p T) = held`, it is `sum p (1 - exp(-p T))`.
    """
    if held >= len(shares):
        return 1.0
    if held < 1:
        return 0.0
    low, high = 0.0, float(held)
    while _filled(shares, high) < held:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _filled(shares, middle) < held else (low, middle)
    return math.fsum(p * -math.expm1(-p * high) for p in shares)


def distinct(shares: Sequence[float], requests: int) -> float:
    """Return how many different adapters stand among so many requests, on average: `sum 1 - (1 - p)^n`."""
    return math.fsum(1 - (1 - p) ** requests for p in shares)


def replicas(requests_per_second: float, tokens: float, tokens_per_second: float, load: float = 0.7) -> int:
    """Return how many engines it takes: `requests x tokens / (tokens/s x load)`, rounded up.

    Args:
        requests_per_second: that come on average.
        tokens: of one answer.
        tokens_per_second: that one engine was measured to write, with as many adapters mixed.
        load: how busy an engine may be on average; near 1 the queue grows without end.
    """
    return math.ceil(requests_per_second * tokens / (tokens_per_second * load))


def need(
    size: int, shares: Sequence[float], requests_per_second: float, tokens: float, tokens_per_second: float, memory: int
) -> Need:
    """Return what it takes to serve adapters of `size` bytes, each replica with `memory` for them and any request."""
    held = min(len(shares), memory // size)
    hits, count = hit_rate(shares, held), replicas(requests_per_second, tokens, tokens_per_second)
    return Need(size, size * len(shares), held, hits, (1 - hits) * requests_per_second / count, count)


def _filled(shares: Sequence[float], time: float) -> float:
    return math.fsum(-math.expm1(-p * time) for p in shares)
