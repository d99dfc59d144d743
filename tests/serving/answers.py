"""What an engine answers, gathered until its last event."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from lorakit.serving.requests import End, Engine, Event, Request, Token


@dataclass
class Answer:
    """The events of one request."""

    events: list[Event] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Event) -> None:
        assert not self.done.is_set(), "nothing follows the end"
        self.events.append(event)
        if isinstance(event, End):
            self.done.set()

    @property
    def tokens(self) -> list[int]:
        """Return the token ids so far."""
        return [event.id for event in self.events if isinstance(event, Token)]

    @property
    def end(self) -> End:
        """Return the last event; it must come."""
        assert self.done.wait(60), "no end came"
        last = self.events[-1]
        assert isinstance(last, End)
        return last


def ask(engine: Engine, requests: Iterable[Request]) -> list[Answer]:
    """Submit requests at once and wait for every end."""
    answers = []
    for request in requests:
        answers.append(Answer())
        engine.submit(request, answers[-1])
    for answer in answers:
        assert answer.end
    return answers
