"""What a server did, for Prometheus: requests, tokens and waits of each adapter, and what the engine holds.

Clients choose the names of adapters, and each name is a time series, so only the first names get their own; all others
are counted together as `other`. What the engine knows is read from it when somebody asks, not pushed.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from lorakit.core.lazy import need
from lorakit.serving.requests import Engine

if TYPE_CHECKING:
    from lorakit.serving.shelf.residents import Usage

MOST_NAMES = 100
OTHER = "other"
_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """Counters of one server, in a registry of its own.

    Args:
        most_names: adapters that are counted by name, the first that come.
    """

    def __init__(self, most_names: int = MOST_NAMES) -> None:
        prometheus = need("prometheus_client", "serve")
        self.registry = prometheus.CollectorRegistry()
        made = {"registry": self.registry}
        self._requests = prometheus.Counter("lora_requests_total", "Requests answered.", ["adapter", "code"], **made)
        self._tokens = prometheus.Counter("lora_tokens_total", "Tokens read and written.", ["adapter", "kind"], **made)
        self._first = prometheus.Histogram(
            "lora_ttft_seconds", "From a request to its first token.", ["adapter"], buckets=_FIRST, **made
        )
        self._between = prometheus.Histogram(
            "lora_itl_seconds", "From one token to the next.", ["adapter"], buckets=_BETWEEN, **made
        )
        self._names: dict[str, str] = {}
        self._digests: dict[str | None, str] = {}
        self._most, self._lock = most_names, threading.Lock()

    def request(self, adapter: str, code: int) -> None:
        """Count a request that was answered with an HTTP code; 499 is a client that went away."""
        self._requests.labels(self.label(adapter), str(code)).inc()

    def answers(self, adapter: str, digest: str | None) -> None:
        """Remember under which name a digest is shown."""
        self._digests[digest] = self.label(adapter)

    def tokens(self, adapter: str, kind: Literal["prompt", "completion"], count: int) -> None:
        """Count tokens read or written."""
        self._tokens.labels(self.label(adapter), kind).inc(count)

    def first_token(self, adapter: str, seconds: float) -> None:
        """Record how long a request waited for its first token."""
        self._first.labels(self.label(adapter)).observe(seconds)

    def between(self, adapter: str, seconds: float, count: int) -> None:
        """Record that `count` tokens came, `seconds` after each other."""
        series = self._between.labels(self.label(adapter))
        for _ in range(count):
            series.observe(seconds)

    def label(self, adapter: str) -> str:
        """Return the name an adapter is counted under: its own, or `other` beyond the first names."""
        with self._lock:
            if adapter not in self._names and len(self._names) < self._most:
                self._names[adapter] = adapter
            return self._names.get(adapter, OTHER)

    def watch(self, engine: Engine, usage: Callable[[], Usage]) -> None:
        """Read the engine's numbers, and what adapters take there, whenever the metrics are asked for."""
        self.registry.register(_Watched(engine, usage, self._by_name))

    def text(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        made: bytes = need("prometheus_client", "serve").generate_latest(self.registry)
        return made

    def _by_name(self, counts: Mapping[str | None, int]) -> dict[str, int]:
        """Return counts by digest as counts by name."""
        named: Counter[str] = Counter()
        for digest, count in counts.items():
            named[self._digests.get(digest) or (OTHER if digest else "base")] += count
        return dict(named)


class _Watched:
    """A collector that asks the engine at each scrape."""

    def __init__(
        self,
        engine: Engine,
        usage: Callable[[], Usage],
        by_name: Callable[[Mapping[str | None, int]], dict[str, int]],
    ) -> None:
        self._engine, self._usage, self._by_name = engine, usage, by_name

    def collect(self) -> Iterable[Any]:
        core = need("prometheus_client.core", "serve")
        stats, slots = self._engine.stats(), self._engine.limits.slots
        waiting, running = self._by_name(stats.waiting_by_adapter), self._by_name(stats.running_by_adapter)
        depth = core.GaugeMetricFamily("lora_queue_depth", "Requests that wait.", labels=["adapter"])
        for name, count in (waiting or {"base": 0}).items():
            depth.add_metric([name], count)
        yield depth
        states = core.GaugeMetricFamily("lora_slots", "Sequences decoded at once.", labels=["state"])
        states.add_metric(["running"], stats.running)
        states.add_metric(["free"], max(0, slots - stats.running))
        yield states
        usage = self._usage()
        yield core.GaugeMetricFamily("lora_adapter_cache_bytes", "Bytes of loaded adapters.", usage.bytes)
        loads = core.CounterMetricFamily("lora_adapter_loads", "Adapters loaded, or not.", labels=["result"])
        loads.add_metric(["loaded"], usage.loads)
        loads.add_metric(["failed"], usage.failures)
        yield loads
        yield core.CounterMetricFamily("lora_step_seconds", "Time spent in the engine's steps.", stats.step_seconds)
        yield core.CounterMetricFamily("lora_preemptions", "Sequences put back to wait.", stats.preemptions)
        info = core.GaugeMetricFamily(
            "vllm:lora_requests_info",
            "vLLM's gauge, read by routers: which adapters run and wait.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        info.add_metric([str(slots), _listed(running), _listed(waiting)], time.time())
        yield info


def _listed(counts: Mapping[str, int]) -> str:
    return ",".join(sorted(name for name, count in counts.items() if count and name != "base"))
