"""From the engine's thread to the event loop: events of a request are handed over in order, and never wait for it.

The engine may not be held up by whoever reads, so a sink only puts an event down and wakes the loop, once for all that
lies there. A reader that lets too much lie is given up: its request ends, and what it costs is bounded.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from lorakit.serving.requests import Event, Sink

Item = tuple[int, Event]


class Feed:
    """The events of the choices of one answer, read on the event loop it is made on.

    Args:
        most: events that may lie here unread.
        given_up: called on the loop, once, when more did; no token is taken any more.
    """

    def __init__(self, most: int, given_up: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[Item] = deque()
        self._ready = asyncio.Event()
        self._most, self._given_up = most, given_up
        self._called = self._full = False

    @property
    def full(self) -> bool:
        """Whether the reader was given up."""
        return self._full

    def sink(self, choice: int) -> Sink:
        """Return the sink of one choice, for the engine's thread."""

        def put(event: Event) -> None:
            if self._full:
                return
            self._events.append((choice, event))
            if not self._called:
                self._called = True
                with suppress(RuntimeError):  # the loop is closed, so nobody reads
                    self._loop.call_soon_threadsafe(self._wake)

        return put

    async def take(self) -> list[Item]:
        """Return all events that lie here, none if it was woken without one."""
        await self._ready.wait()
        self._ready.clear()
        items = []
        while self._events:
            items.append(self._events.popleft())
        return items

    def wake(self) -> None:
        """Let the reader look, though there may be no event."""
        self._ready.set()

    def _wake(self) -> None:
        self._called = False  # first: whatever is put down from now on wakes the loop again
        if len(self._events) > self._most and not self._full:
            self._full = True
            self._events.clear()
            self._given_up()
        self._ready.set()
