"""The engine without a model keeps the contract of engines."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorakit.errors import BusyError, RequestError, UnknownAdapterError
from lorakit.serving.requests import End, Engine, Event, Request, Sampling, Token
from tests.serving.echo import EchoEngine


@pytest.fixture
def engine() -> Iterator[EchoEngine]:
    made = EchoEngine(slots=2, queue=2)
    yield made
    made.close()


def answer(engine: Engine, request: Request) -> list[Event]:
    """Return all events of a request, the end included."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    engine.submit(request, events.put)
    found = [events.get(timeout=5)]
    while not isinstance(found[-1], End):
        found.append(events.get(timeout=5))
    return found


def test_the_prompt_comes_back_reversed(engine: EchoEngine) -> None:
    assert answer(engine, Request((1, 2, 3))) == [Token(3), Token(2), Token(1), End("stop")]
    assert answer(engine, Request((1, 2, 3), sampling=Sampling(max_tokens=2))) == [Token(3), Token(2), End("length")]
    on = Sampling(max_tokens=3, ignore_eos=True, logprobs=2)
    assert answer(engine, Request((7, 8), sampling=on))[2:] == [Token(8, 0.0, ((8, 0.0), (9, -1.0))), End("length")]


def test_it_refuses_what_an_engine_refuses(engine: EchoEngine, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="the prompt is empty"):
        engine.submit(Request(()), print)
    with pytest.raises(UnknownAdapterError):
        engine.submit(Request((1,), adapter="ab"), print)
    assert engine.load("ab", tmp_path).digest == "ab"
    assert answer(engine, Request((1,), adapter="ab"))[-1] == End("stop")
    engine.unload("ab")
    assert (engine.loads["ab"], engine.unloads["ab"], engine.loaded) == (1, 1, {})


def test_a_held_engine_fills_its_slots_then_its_queue_then_refuses(engine: EchoEngine) -> None:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    with engine.hold():
        for count in range(4):
            engine.submit(Request((1,), id=str(count)), events.put)
            while count < 2 and engine.stats().running <= count:
                time.sleep(0.001)
        assert (engine.stats().running, engine.stats().waiting) == (2, 2)
        with pytest.raises(BusyError):
            engine.submit(Request((1,)), events.put)
        engine.cancel("3")
        assert events.get(timeout=5) == End("cancelled")
    assert [events.get(timeout=5) for _ in range(6)].count(End("stop")) == 3


def test_a_deadline_and_a_close_end_requests(engine: EchoEngine) -> None:
    with engine.hold():
        assert answer(engine, Request((1,), deadline=time.monotonic() + 0.01)) == [End("deadline")]
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        engine.submit(Request((1,)), events.put)
        engine.close()
    assert events.get(timeout=5) == End("cancelled")
