"""Continuous batching on one thread: requests join and leave between any two steps, each with its own adapter.

A step decodes one token of every running sequence and reads a piece of the prompts that have just come, so a long
prompt holds nobody up. Running sequences stand in slots without gaps, the decoded ones first. Where the positions they
may take together run out, the youngest steps back into the queue and later reads its own text again.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from lorakit.errors import BusyError, RequestError, ServingError, UnknownAdapterError
from lorakit.persist import load
from lorakit.serving.batching.decoder import Decoder, Piece
from lorakit.serving.batching.place import Choice, Prepared
from lorakit.serving.batching.sampling import Draw, choose
from lorakit.serving.batching.workers import release_workers
from lorakit.serving.fair_queue import FairQueue
from lorakit.serving.requests import (
    LATE,
    End,
    Event,
    Limits,
    Loaded,
    Reason,
    Request,
    Sink,
    Stats,
    check_request,
    nobody,
)

PIECE = 256
"""Tokens of prompts that one step reads beside decoded sequences; four times as many where none is decoded."""

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Sequence:
    """One request on its way: its text so far, and how much of it stands in its slot."""

    request: Request
    sink: Sink
    draw: Draw
    choice: Choice | None
    tokens: list[int]
    cached: int = 0
    charged: int = 0
    admitted: int = 0
    cancelled: bool = False

    @property
    def generated(self) -> int:
        """Return how many tokens the answer has."""
        return len(self.tokens) - len(self.request.prompt)


class SlotEngine:
    """Lorakit's own engine: any decoder of transformers, any number of low-rank adapters (see `Engine`)."""

    def __init__(
        self,
        model: Any,
        *,
        stops: Collection[int] = (),
        slots: int = 16,
        context: int | None = None,
        queue: int = 256,
        positions: int | None = None,
        packed: bool = True,
    ) -> None:
        """Take over `model` and start.

        Args:
            model: a decoder of transformers; `close` gives it back as it was.
            stops: tokens that end an answer.
            slots: sequences that run at once.
            context: positions of one sequence; the model's own, and at most 4096, if None.
            queue: requests that may wait.
            positions: positions that all running sequences may take together; as many as there are if None.
            packed: keep weights in oneDNN's blocks where that is faster.

        Raises:
            AttachError: a model this engine cannot serve.
        """
        self._decoder = Decoder(model, slots, context, packed)
        release_workers()
        self._limits = Limits(self._decoder.context, self._decoder.vocabulary, slots, queue)
        self._stops, self._positions = frozenset(stops), positions or slots * self._decoder.context
        self._lock = threading.Condition()
        self._queue: FairQueue[Sequence] = FairQueue()
        self._running: list[Sequence] = []
        self._decoding = 0
        self._by_id: dict[str, Sequence] = {}
        self._adapters: dict[str, Prepared] = {}
        self._held: set[Prepared] = set()
        self._orphans: set[Prepared] = set()
        self._closing, self._broken = False, ""
        self._swept, self._numbers = 0.0, count()
        self._prompt_tokens = self._generated = self._preemptions = self._steps = 0
        self._seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="lorakit-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread inside torch while the interpreter goes ends the process with an abort

    @property
    def limits(self) -> Limits:
        """Return what one request may ask for."""
        return self._limits

    def load(self, digest: str, folder: Path) -> Loaded:
        """Read an adapter's folder and hold it under `digest`; sequences run on meanwhile."""
        with self._lock:
            found = self._adapters.get(digest)
        if found is None:
            try:
                found = self._decoder.prepare(digest, load(folder, checked=True))
            finally:
                release_workers()
            with self._lock:
                found = self._adapters.setdefault(digest, found)
        return Loaded(digest, len(found.pairs), found.bytes)

    def unload(self, digest: str) -> None:
        """Forget an adapter; sequences that run with it end as they would have."""
        with self._lock:
            if (found := self._adapters.pop(digest, None)) is not None:
                self._orphans.add(found)
                self._lock.notify()

    def submit(self, request: Request, sink: Sink) -> None:
        """Queue a request; its tokens and, in every case, one `End` reach `sink`."""
        check_request(request, self._limits)
        draw = Draw(request.sampling)
        with self._lock:
            if self._broken:
                raise ServingError(f"the engine broke: {self._broken}; start the server again")
            if self._closing:
                raise BusyError("the engine is stopping", 1.0)
            if request.id in self._by_id:
                raise RequestError(f"a request named {request.id!r} is running; give another id")
            choice = None
            if request.adapter is not None:
                if request.adapter not in self._adapters:
                    raise UnknownAdapterError(f"no adapter {request.adapter!r} is loaded")
                choice = Choice(self._adapters[request.adapter], request.scale)
            if self._queue.full(request.tenant, self._limits.queue):
                raise BusyError(f"{self._limits.queue} requests wait, and no more may", self._wait())
            made = Sequence(request, sink, draw, choice, list(request.prompt))
            self._by_id[request.id] = made
            self._queue.push(made, request.tenant, request.adapter)
            self._lock.notify()

    def cancel(self, id: str) -> None:
        """End a request soon with `cancelled`."""
        with self._lock:
            if (found := self._by_id.get(id)) is not None:
                found.cancelled, self._swept = True, 0.0
                self._lock.notify()

    def stats(self) -> Stats:
        """Return what it does now."""
        with self._lock:
            running: dict[str | None, int] = {}
            for one in self._running:
                running[one.request.adapter] = running.get(one.request.adapter, 0) + 1
            waiting = self._queue.waiting()
            return Stats(
                len(self._running), sum(waiting.values()), waiting, running, self._prompt_tokens, self._generated,
                self._preemptions, self._steps, self._seconds, self._broken,
            )  # fmt: skip

    def close(self) -> None:
        """End every request with `cancelled`, stop, and give the model back."""
        with self._lock:
            first, self._closing = not self._closing, True
            self._lock.notify()
        self._thread.join()
        if first:
            atexit.unregister(self.close)
            self._decoder.close()

    def _run(self) -> None:
        try:
            while self._prepared():
                try:
                    self._step()
                except Exception as fault:  # whatever the model raises, its requests end and the engine goes on
                    _log.exception("a step failed")
                    with self._lock:
                        self._drop(self._running, "error", f"{type(fault).__name__}: {fault}")
        except Exception as fault:
            _log.exception("the engine broke")
            with self._lock:
                self._broken = f"{type(fault).__name__}: {fault}"
                self._drop(self._by_id.values(), "error", f"the engine broke: {self._broken}")

    def _prepared(self) -> bool:
        """Wait for work and let everybody in whom there is room for; False where the engine shall stop."""
        with self._lock:
            self._sweep()
            self._admit()
            while not (self._running or self._closing):
                self._let_go()
                self._lock.wait()
                self._sweep()
                self._admit()
            if self._orphans:
                self._let_go()
            if self._closing:
                self._drop(self._by_id.values(), "cancelled", "the engine stopped")
                return False
            self._make_room()
            return True

    def _sweep(self) -> None:
        """End what nobody waits for any more; those in the queue are looked at now and then."""
        now = time.monotonic()
        due = now - self._swept > 0.05
        self._swept = now if due else self._swept
        for one in [*self._running, *(self._queue if due else ())]:
            if one.cancelled:
                self._end(one, "cancelled")
            elif one.request.late(now):
                self._end(one, LATE.reason, LATE.detail)

    def _admit(self) -> None:
        """Give free slots to those who are next."""
        taken, now = sum(len(one.tokens) + 1 for one in self._running), time.monotonic()
        while len(self._running) < self._limits.slots and (one := self._queue.pop()) is not None:
            if one.request.late(now):
                self._end(one, LATE.reason, LATE.detail)
                continue
            if self._running and taken + len(one.tokens) + 1 > self._positions:
                self._queue.push(one, one.request.tenant, one.request.adapter, first=True)
                return
            if one.choice is not None and one.choice.adapter not in self._held:
                try:
                    self._decoder.bank.hold(one.choice.adapter)
                except Exception as fault:  # of memory, most likely
                    _log.exception("adapter %s could not be taken in", one.request.adapter)
                    self._end(one, "error", f"the adapter could not be taken in: {type(fault).__name__}: {fault}")
                    continue
                self._held.add(one.choice.adapter)
            one.admitted = next(self._numbers)
            self._running.append(one)
            taken += len(one.tokens) + 1
            self._charge(one)

    def _make_room(self) -> None:
        """Let the youngest step back while the coming step would take more positions than there are."""
        while len(self._running) > 1 and sum(len(one.tokens) + 1 for one in self._running) > self._positions:
            youngest = max(self._running, key=lambda one: one.admitted)
            self._leave(youngest)
            youngest.cached = 0
            self._preemptions += 1
            self._queue.push(youngest, youngest.request.tenant, youngest.request.adapter, first=True)

    def _step(self) -> None:
        """Run the model once, and give each sequence its token."""
        began = time.perf_counter()
        decoded = [(one.tokens[-1], one.cached, one.choice) for one in self._running[: self._decoding]]
        left = PIECE if decoded else 4 * PIECE
        pieces: list[Piece] = []
        for slot, one in enumerate(self._running[self._decoding :], self._decoding):
            part = one.tokens[one.cached : one.cached + left]
            if not part:
                break
            left -= len(part)
            pieces.append(Piece(slot, one.cached, part, one.choice, one.cached + len(part) == len(one.tokens)))
        read = self._running[: self._decoding + sum(piece.ends for piece in pieces)]
        logits = self._decoder.step(decoded, pieces)
        tokens = choose(logits, [one.draw for one in read])
        for piece in pieces:
            self._running[piece.slot].cached += len(piece.tokens)
            self._prompt_tokens += len(piece.tokens)
        for one in self._running[: self._decoding]:
            one.cached += 1
        with self._lock:
            self._decoding = len(read)
            for one, token in zip(read, tokens, strict=True):
                if token is None:
                    whose = f"adapter {one.request.adapter[:12]}" if one.request.adapter else "the base"
                    self._end(one, "error", f"the logits of {whose} are NaN; its weights or the base's are damaged")
                elif token.id in self._stops and not one.request.sampling.ignore_eos:
                    self._end(one, "stop")
                else:
                    self._tell(one, token)
                    one.tokens.append(token.id)
                    self._generated += 1
                    self._charge(one)
                    if one.generated >= one.request.sampling.max_tokens or len(one.tokens) >= self._limits.context:
                        self._end(one, "length")
            self._steps += 1
            self._seconds += time.perf_counter() - began

    def _end(self, one: Sequence, reason: Reason, detail: str = "") -> None:
        """Send a request its last event, and free its slot."""
        del self._by_id[one.request.id]
        if one in self._running:
            self._leave(one)
        else:
            self._queue.remove(one)
        self._tell(one, End(reason, detail))

    def _drop(self, those: Iterable[Sequence], reason: Reason, detail: str) -> None:
        """End requests, all that run among them, without a look at the model, which may have failed."""
        gone = list(those)
        with suppress(Exception):
            for slot in range(len(self._running)):
                self._decoder.slots.wipe(slot)
        self._running.clear()
        self._decoding = 0
        for one in gone:
            del self._by_id[one.request.id]
            self._queue.remove(one)
            self._tell(one, End(reason, detail))

    def _charge(self, one: Sequence) -> None:
        """Count what a request took that was not counted yet: a text that is read again was not its wish."""
        self._queue.charge(one.request.tenant, one.request.adapter, len(one.tokens) - one.charged)
        one.charged = len(one.tokens)

    def _tell(self, one: Sequence, event: Event) -> None:
        try:
            one.sink(event)
        except Exception:  # a listener that fails is its own loss; it hears no more
            _log.exception("the listener of %s failed", one.request.id)
            one.cancelled, one.sink = True, nobody

    def _leave(self, one: Sequence) -> None:
        """Take a sequence out of its slot and close the gap: the last decoded fills it, and the prompts move up.

        The prompts stay in their order, or one that is half read could be overtaken for ever; few of them have
        positions to copy. Nothing is left behind, or what a damaged adapter made would reach the slot's next sequence.
        """
        at = self._running.index(one)
        if at < self._decoding:
            self._decoding -= 1
            self._move(self._decoding, at)
            at = self._decoding
        for source in range(at + 1, len(self._running)):
            self._move(source, source - 1)
        last = self._running.pop()
        self._decoder.slots.wipe(len(self._running), 0, last.cached)

    def _move(self, source: int, target: int) -> None:
        if source != target:
            moved, gone = self._running[source], self._running[target]
            self._decoder.slots.move(source, target, moved.cached)
            self._decoder.slots.wipe(target, moved.cached, max(moved.cached, gone.cached))
            self._running[target] = moved

    def _let_go(self) -> None:
        """Free what was unloaded and is not used any more, and forget who is gone."""
        used = {one.choice.adapter for one in self._by_id.values() if one.choice is not None}
        for adapter in self._orphans - used:
            self._orphans.discard(adapter)
            if adapter in self._held:
                self._held.discard(adapter)
                self._decoder.bank.drop(adapter)
        self._queue.forget({(one.request.tenant, one.request.adapter) for one in self._running})

    def _wait(self) -> float:
        """Return about how many seconds go by until a place in the queue is free: one answer's share of a slot."""
        return max(1.0, self._seconds / max(1, self._generated) * 64)
