"""An engine without a model: it answers each prompt with the prompt reversed, and keeps the whole contract otherwise.

What stands above an engine is tested on it: it queues, refuses, cancels and times out as a real one, and counts what it
was asked to load. `hold()` stops it between two tokens, so that a test can look at a request that is running.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import BusyError, UnknownAdapterError
from lorakit.serving.requests import End, Event, Limits, Loaded, Reason, Request, Sink, Stats, Token, check_request


@dataclass(eq=False)
class _Running:
    """A request with what is left of its answer."""

    request: Request
    sink: Sink
    answer: deque[int]
    given: int = 0
    cancelled: bool = False


class EchoEngine:
    """Answers each request with its prompt reversed, one token a step, on its own thread.

    The answer ends with `stop` where the prompt does, with `length` at `max_tokens`; under `ignore_eos` it starts over.
    A loaded adapter takes the bytes of its folder's safetensors and changes nothing in the answer.

    Args:
        context: positions of one sequence.
        vocabulary: tokens are from 0 to below it.
        slots: requests that are answered at once.
        queue: requests that may wait.
        step_seconds: how long one step takes.
        load_seconds: how long one load takes.
    """

    def __init__(
        self,
        *,
        context: int = 4096,
        vocabulary: int = 1000,
        slots: int = 8,
        queue: int = 64,
        step_seconds: float = 0.0,
        load_seconds: float = 0.0,
    ) -> None:
        self._limits = Limits(context, vocabulary, slots, queue)
        self.step_seconds, self.load_seconds = step_seconds, load_seconds
        self.loads: Counter[str] = Counter()
        self.unloads: Counter[str] = Counter()
        self.loaded: dict[str, Loaded] = {}
        self.broken: dict[str, Exception] = {}
        """Digests whose load raises, and what."""
        self.submitted: list[Request] = []
        self.peak_bytes = 0
        self._waiting: deque[_Running] = deque()
        self._running: list[_Running] = []
        self._changed = threading.Condition()
        self._held = self._closed = False
        self._totals = _Totals()
        self._thread = threading.Thread(target=self._work, name="echo-engine", daemon=True)
        self._thread.start()

    @property
    def limits(self) -> Limits:
        return self._limits

    def load(self, digest: str, folder: Path) -> Loaded:
        time.sleep(self.load_seconds)
        with self._changed:
            self.loads[digest] += 1
            if digest in self.broken:
                raise self.broken[digest]
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            self.loaded[digest] = Loaded(digest, 1, size)
            self.peak_bytes = max(self.peak_bytes, sum(one.bytes for one in self.loaded.values()))
            return self.loaded[digest]

    def unload(self, digest: str) -> None:
        with self._changed:
            self.unloads[digest] += 1
            self.loaded.pop(digest, None)

    def submit(self, request: Request, sink: Sink) -> None:
        check_request(request, self._limits)
        with self._changed:
            if self._closed:
                raise BusyError("the engine is closed; ask another", retry_after=1.0)
            if request.adapter is not None and request.adapter not in self.loaded:
                raise UnknownAdapterError(f"adapter {request.adapter} is not loaded; load it first")
            if len(self._waiting) >= self._limits.queue:
                raise BusyError(f"{len(self._waiting)} requests wait already; try again in 1 s", retry_after=1.0)
            self.submitted.append(request)
            self._waiting.append(_Running(request, sink, deque(reversed(request.prompt))))
            self._totals.prompt_tokens += len(request.prompt)
            self._changed.notify_all()

    def cancel(self, id: str) -> None:
        with self._changed:
            for one in (*self._waiting, *self._running):
                one.cancelled |= one.request.id == id
            self._changed.notify_all()

    def stats(self) -> Stats:
        with self._changed:
            waiting, running = (Counter(r.request.adapter for r in rs) for rs in (self._waiting, self._running))
            return Stats(
                running=len(self._running),
                waiting=len(self._waiting),
                waiting_by_adapter=waiting,
                running_by_adapter=running,
                prompt_tokens=self._totals.prompt_tokens,
                generated_tokens=self._totals.generated_tokens,
                preemptions=0,
                steps=self._totals.steps,
                step_seconds=self._totals.step_seconds,
            )

    def close(self) -> None:
        with self._changed:
            self._closed, self._held = True, False
            self._changed.notify_all()
        self._thread.join(timeout=10)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Give out no token inside the block; cancels and deadlines still end requests."""
        with self._changed:
            self._held = True
        try:
            yield
        finally:
            with self._changed:
                self._held = False
                self._changed.notify_all()

    def _work(self) -> None:
        closed = False
        while not closed:
            with self._changed:
                while not (self._waiting or self._running or self._closed):
                    self._changed.wait()
                closed = self._closed
                while self._waiting and len(self._running) < self._limits.slots:
                    self._running.append(self._waiting.popleft())
                events = self._step()
                if not events and not closed:
                    self._changed.wait(0.005)
            for sink, event in events:
                sink(event)
            if self.step_seconds and events:
                time.sleep(self.step_seconds)

    def _step(self) -> list[tuple[Sink, Event]]:
        """Return one event or two of each request that has any, and forget those that ended."""
        events: list[tuple[Sink, Event]] = []
        ended: set[int] = set()
        now = time.monotonic()
        for one in (*self._running, *self._waiting):
            reason: Reason | None = None
            if self._closed or one.cancelled:
                reason = "cancelled"
            elif one.request.deadline is not None and now >= one.request.deadline:
                reason = "deadline"
            elif one in self._running and not self._held:
                events.append((one.sink, self._token(one)))
                reason = self._finished(one)
            if reason is not None:
                events.append((one.sink, End(reason)))
                ended.add(id(one))
        self._running = [one for one in self._running if id(one) not in ended]
        self._waiting = deque(one for one in self._waiting if id(one) not in ended)
        self._totals.steps += bool(events)
        self._totals.step_seconds += self.step_seconds * bool(events)
        return events

    def _token(self, one: _Running) -> Token:
        if not one.answer:
            one.answer.extend(reversed(one.request.prompt))
        self._totals.generated_tokens += 1
        one.given += 1
        token, asked = one.answer.popleft(), one.request.sampling.logprobs
        if asked is None:
            return Token(token)
        top = tuple(((token + rank) % self._limits.vocabulary, -float(rank)) for rank in range(asked))
        return Token(token, 0.0, top)

    def _finished(self, one: _Running) -> Reason | None:
        sampling, prompt = one.request.sampling, one.request.prompt
        if not one.answer and not sampling.ignore_eos:
            return "stop"
        if one.given >= sampling.max_tokens or len(prompt) + one.given >= self._limits.context:
            return "length"
        return None


@dataclass
class _Totals:
    """What was done since the start."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0
