"""An answer while it is made: one or more choices, each with its engine request, its writer and its place in the feed.

However it ends, `close` runs: the engine's requests are cancelled where they still run, and the adapter is released.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lorakit.errors import ServingError
from lorakit.serving.feed import Feed
from lorakit.serving.prompts import Ids
from lorakit.serving.requests import End, Engine, Event, Reason, Request, Token
from lorakit.serving.text import Writer

if TYPE_CHECKING:
    from lorakit.serving.metrics import Metrics
    from lorakit.serving.shelf.names import Resolved

Lost = Literal["error", "deadline", "cancelled", "slow"]


class Interrupted(ServingError):
    """An answer that will not be finished.

    `why`: the engine failed (`error`) or stopped (`cancelled`), nobody waits any more (`deadline`), or the client did
    not read (`slow`).
    """

    def __init__(self, why: Lost, message: str) -> None:
        super().__init__(message)
        self.why = why


@dataclass(frozen=True)
class Piece:
    """What became certain of one choice: text, the tokens that came with it, and why it ended, if it did."""

    choice: int
    text: str
    tokens: tuple[Token, ...] = ()
    reason: Literal["stop", "length"] | None = None
    matched: bool = False
    """Whether a stop string ended it, and not the model."""


@dataclass
class _Choice:
    request: Request
    writer: Writer
    open: bool = True
    last: float | None = None  # when its last tokens came


class Answer:
    """The answer to one question, read once, on the event loop.

    Args:
        id: of the answer; ratings name it.
        resolved: which adapter answers.
        prompts: token ids, one a prompt; choice `i` answers `prompts[i // n]`.
        requests: the engine's, one a choice, not submitted yet.
        writers: one a choice.
        most_unread: events that may wait for the reader.
        ended: called once, when nothing more will come.
    """

    def __init__(
        self,
        id: str,
        resolved: Resolved,
        prompts: Sequence[Ids],
        requests: Sequence[Request],
        writers: Sequence[Writer],
        *,
        engine: Engine,
        metrics: Metrics,
        most_unread: int,
        started: float,
        ended: Callable[[Answer], None],
    ) -> None:
        self.id, self.resolved, self.prompts = id, resolved, prompts
        self.created = int(time.time())
        self.completion_tokens = 0
        self.reason: Reason = "cancelled"
        """How it ended; nobody having read it to its end is `cancelled`."""
        self.first: float | None = None
        """Seconds to the first token."""
        self._choices = [_Choice(request, writer) for request, writer in zip(requests, writers, strict=True)]
        self._engine, self._metrics, self.started, self._ended = engine, metrics, started, ended
        self._feed = Feed(most_unread * len(requests), self.close)
        self._lost: Interrupted | None = None
        self.submitted = False
        """Whether the engine took it."""
        self._closed = self._cut = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def prompt_tokens(self) -> int:
        """Return the tokens of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def adapter(self) -> str:
        """Return the name of what answers: the arm drawn, if there was a draw."""
        return self.resolved.arm or self.resolved.name

    def submit(self) -> None:
        """Hand every choice to the engine, or none.

        Raises:
            RequestError: a prompt the engine cannot take.
            BusyError: no room for all of them.
        """
        for number, choice in enumerate(self._choices):
            self._engine.submit(choice.request, self._feed.sink(number))
        self.submitted = True
        deadline = self._choices[0].request.deadline
        if deadline is not None:
            wait = max(0.0, deadline - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(wait, self._too_late)
        self._metrics.answers(self.adapter, self.resolved.digest)
        self._metrics.tokens(self.adapter, "prompt", self.prompt_tokens)

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """Yield what became certain, as soon as it did; what comes at once comes in one list.

        Raises:
            Interrupted: it will not be finished.
        """
        try:
            while any(choice.open for choice in self._choices):
                items = await self._feed.take()
                if self._lost is not None:
                    raise self._lost
                if self._feed.full:
                    raise Interrupted("slow", "the client reads more slowly than the model writes; this answer ended")
                self._time(items)
                found = [piece for number, event in items if (piece := self._piece(number, event)) is not None]
                if found:
                    yield found
        except Interrupted as lost:
            self.reason = "cancelled" if lost.why == "slow" else lost.why
            raise
        finally:
            self.close()

    def close(self) -> None:
        """End what still runs, and let go of the adapter; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for choice in self._choices:
            if choice.open:
                self._engine.cancel(choice.request.id)
        self._metrics.tokens(self.adapter, "completion", self.completion_tokens)
        self._ended(self)

    def _piece(self, number: int, event: Event) -> Piece | None:
        choice = self._choices[number]
        if not choice.open:
            return None  # of a step that was under way when a stop string was found
        if isinstance(event, Token):
            self.completion_tokens += 1
            text = choice.writer.push(event.id)
            if not choice.writer.stopped:
                return Piece(number, text, (event,))
            choice.open = False
            self._engine.cancel(choice.request.id)
            return self._ends(Piece(number, text, (event,), "stop", matched=True))
        choice.open = False
        if event.reason not in ("stop", "length"):
            raise _interrupted(event)
        return self._ends(Piece(number, choice.writer.flush(), (), "stop" if event.reason == "stop" else "length"))

    def _ends(self, piece: Piece) -> Piece:
        """Remember how the answer ended, once no choice is open: `length` where one of them was cut."""
        self._cut |= piece.reason == "length"
        if not any(choice.open for choice in self._choices):
            self.reason = "length" if self._cut else "stop"
        return piece

    def _time(self, items: Sequence[tuple[int, Event]]) -> None:
        now = time.monotonic()
        for number in {number for number, _ in items}:
            choice = self._choices[number]
            count = sum(1 for other, event in items if other == number and isinstance(event, Token))
            if not count:
                continue
            if choice.last is None:
                self._metrics.first_token(self.adapter, now - self.started)
                self._metrics.between(self.adapter, 0.0, count - 1)
                self.first = now - self.started if self.first is None else self.first
            else:
                self._metrics.between(self.adapter, (now - choice.last) / count, count)
            choice.last = now

    def _too_late(self) -> None:
        self._lost = _interrupted(End("deadline"))
        self.close()
        self._feed.wake()


def _interrupted(end: End) -> Interrupted:
    match end.reason:
        case "deadline":
            return Interrupted("deadline", "the answer took longer than this server's timeout; ask for fewer tokens")
        case "cancelled":
            return Interrupted("cancelled", "the server stopped before the answer was finished; ask again")
        case _:
            return Interrupted("error", end.detail or "the model failed on this request")
