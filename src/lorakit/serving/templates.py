"""Chat templates are programs, an adapter's written by whoever trained it: one at a time, and for a second at most.

Jinja's sandbox keeps them from files and from Python, and not from running for ever. So a rendering is timed between
two of its lines, on the processor's clock of its thread; a single operation on huge values is not cut short.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from weakref import WeakValueDictionary

from lorakit.errors import BusyError, RequestError

SECONDS = 1.0
"""Of a processor, for one conversation; an honest template takes a few thousandths."""


class Templates:
    """Lets one conversation at a time be rendered by a template, and those of other templates meanwhile."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._guard = threading.Lock()
        self._turns: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()

    @contextmanager
    def rendering(self, template: str, model: str) -> Iterator[None]:
        """Render within, alone with this template; `model` is for errors.

        Raises:
            RequestError: it takes longer than it may.
            BusyError: conversations before this one take as long as it may.
        """
        with self._guard:
            turn = self._turns.setdefault(template, threading.Lock())
        if not turn.acquire(timeout=2 * self._seconds):
            raise BusyError(
                f"the chat template of {model} is busy with other conversations; ask again", retry_after=1.0
            )
        try:
            with _within(self._seconds):
                yield
        except _TooLong:
            raise RequestError(
                f"messages: the chat template of {model} ran for more than {self._seconds:g} s on this conversation "
                "and was stopped; send less, or mend the template",
                param="messages",
            ) from None
        finally:
            turn.release()


class _TooLong(BaseException):
    """The time is over; no `except Exception` in between keeps it."""


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """End what this thread runs within, between two lines of Python, once it has had its time of the processor."""
    until = time.thread_time() + seconds

    def look(frame: FrameType, event: str, found: Any) -> Any:
        if time.thread_time() > until:
            raise _TooLong
        return look if frame.f_code.co_filename == "<template>" else None  # of others the calls are enough

    before = sys.gettrace()
    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(before)
