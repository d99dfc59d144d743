"""Requests on their way to an engine in another process: the queue on this side, the answers as they come back.

What every engine elsewhere must keep alike stands here once: a bounded queue that is fair to tenants and adapters, at
most so many answers at a time, deadlines, a cancel that reaches the other side, and one `End` for each request,
whatever breaks. How a request is carried there is a function that blocks, on a thread of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from lorakit.errors import BusyError, RequestError, ServingError
from lorakit.serving.fair_queue import FairQueue
from lorakit.serving.requests import LATE, End, Event, Request, Sink, Stats, Token, nobody

_PATIENCE = 30.0  # seconds `close` waits for the other side to let go
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Errand:
    """One request on its way."""

    request: Request
    sink: Sink
    relay: Relay
    told: int = 0
    begun: bool = False
    verdict: End | None = None
    """Why nobody waits for it any more; it then ends so, whatever the other side says."""
    halt: Callable[[], None] | None = None

    def tell(self, token: Token) -> None:
        """Give a token to whoever asked, unless nobody waits any more."""
        if self.verdict is None:
            self.relay.tell(self, token)

    def breaks(self, halt: Callable[[], None]) -> None:
        """Say how the errand is broken off from another thread; it is called at once where nobody waits already."""
        with self.relay.lock:
            self.halt = halt
            self.relay.lock.notify_all()


Carry = Callable[[Errand], End]
"""Carries one errand to its end: tells its tokens, blocks meanwhile, and may raise."""


class Relay:
    """Errands in order, each carried on one of at most `slots` threads.

    Args:
        carry: takes one request there and its tokens back.
        slots: answers that are under way at once.
        queue: requests that may wait for one.
        name: of the threads.
    """

    def __init__(self, carry: Carry, slots: int, queue: int, name: str) -> None:
        self._carry, self._slots, self._most, self._name = carry, slots, queue, name
        self.lock = threading.Condition()
        self._queue: FairQueue[Errand] = FairQueue()
        self._by_id: dict[str, Errand] = {}
        self._carriers: set[threading.Thread] = set()
        self._closing = False
        self._prompt_tokens = self._generated = 0
        self._keeper = threading.Thread(target=self._keep, name=f"{name}-keeper", daemon=True)
        self._keeper.start()

    def submit(self, request: Request, sink: Sink) -> None:
        """Queue a request that was checked.

        Raises:
            BusyError: as many wait as may.
            RequestError: an id that is under way.
        """
        with self.lock:
            if self._closing:
                raise BusyError("the engine is stopping", 1.0)
            if request.id in self._by_id:
                raise RequestError(f"a request named {request.id!r} is running; give another id")
            running = sum(one.begun for one in self._by_id.values())
            if self._queue.full(request.tenant, self._most + max(0, self._slots - running)):
                raise BusyError(f"{self._most} requests wait, and no more may", 1.0)
            made = self._by_id[request.id] = Errand(request, sink, self)
            self._queue.push(made, request.tenant, request.adapter)
            if len(self._carriers) < self._slots:
                carrier = threading.Thread(target=self._work, name=f"{self._name}-carrier", daemon=True)
                self._carriers.add(carrier)
                carrier.start()
            self.lock.notify_all()

    def cancel(self, id: str) -> None:
        """End a request soon with `cancelled`; an unknown or ended one is left alone."""
        with self.lock:
            if (one := self._by_id.get(id)) is not None and one.verdict is None:
                one.verdict = End("cancelled")
                self.lock.notify_all()

    def tell(self, one: Errand, event: Event) -> None:
        """Give an event to whoever asked; a listener that fails hears no more."""
        if isinstance(event, Token):
            with self.lock:
                one.told += 1
                self._generated += 1
                self._queue.charge(one.request.tenant, one.request.adapter, 1.0)
        try:
            one.sink(event)
        except Exception:  # a listener that fails is its own loss
            _log.exception("the listener of %s failed", one.request.id)
            one.sink = nobody
            self.cancel(one.request.id)

    def adapters(self) -> set[str | None]:
        """Return the adapters of the requests that wait or are under way."""
        with self.lock:
            return {one.request.adapter for one in self._by_id.values()}

    def stats(self) -> Stats:
        """Return what is under way; of the other side's steps nothing is known here."""
        with self.lock:
            running = Counter(one.request.adapter for one in self._by_id.values() if one.begun)
            waiting = self._queue.waiting()
            return Stats(sum(running.values()), sum(waiting.values()), waiting, running,
                         self._prompt_tokens, self._generated, 0, 0, 0.0)  # fmt: skip

    def close(self) -> None:
        """End every request with `cancelled`; no more are taken."""
        with self.lock:
            self._closing = True
            self.lock.notify_all()
        self._keeper.join(_PATIENCE)
        for carrier in list(self._carriers):
            carrier.join(_PATIENCE)

    def _work(self) -> None:
        """Carry errands until none waits."""
        while (one := self._next()) is not None:
            try:
                end = self._carry(one)
            except ServingError as told:
                end = End("error", str(told))
            except Exception as fault:  # whatever breaks, the request ends and the next is carried
                if one.verdict is None:
                    _log.exception("%s could not be carried", one.request.id)
                end = End("error", f"{type(fault).__name__}: {fault}")
            with self.lock:
                del self._by_id[one.request.id]
                self.lock.notify_all()
            self.tell(one, one.verdict or end)

    def _next(self) -> Errand | None:
        with self.lock:
            one = self._queue.pop()
            if one is None:
                self._carriers.discard(threading.current_thread())
                return None
            one.begun = True
            self._prompt_tokens += len(one.request.prompt)
            self._queue.charge(one.request.tenant, one.request.adapter, len(one.request.prompt))
            return one

    def _keep(self) -> None:
        """End what nobody waits for any more: here where it has not begun, else by breaking off its errand."""
        while True:
            with self.lock:
                ended, halts = self._due()
                if not ended and not halts:
                    if self._closing and not self._by_id:
                        return
                    self._queue.forget({(one.request.tenant, one.request.adapter) for one in self._by_id.values()})
                    self.lock.wait(self._until_due())
                    continue
            for halt in halts:
                try:
                    halt()
                except Exception:  # it is broken already
                    _log.debug("an errand was broken off twice", exc_info=True)
            for one in ended:
                assert one.verdict is not None
                self.tell(one, one.verdict)

    def _due(self) -> tuple[list[Errand], list[Callable[[], None]]]:
        ended: list[Errand] = []
        halts: list[Callable[[], None]] = []
        for one in list(self._by_id.values()):
            if self._judged(one) is None:
                continue
            if not one.begun:
                self._queue.remove(one)
                del self._by_id[one.request.id]
                ended.append(one)
            elif one.halt is not None:
                halts.append(one.halt)
                one.halt = None
        return ended, halts

    def _judged(self, one: Errand) -> End | None:
        """Return why nobody waits for an errand any more, if so."""
        if one.verdict is None and self._closing:
            one.verdict = End("cancelled", "the engine stopped")
        elif one.verdict is None and one.request.late(time.monotonic()):
            one.verdict = LATE
        return one.verdict

    def _until_due(self) -> float | None:
        """Return the seconds until the next deadline of those that are still waited for."""
        waited_for = [one.request.deadline for one in self._by_id.values() if one.verdict is None]
        deadlines = [deadline for deadline in waited_for if deadline is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
