from __future__ import annotations

import asyncio
import threading
from typing import Any

from lorakit.serving.feed import Feed
from lorakit.serving.requests import End, Token


def on_thread(work: Any) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_events_arrive_in_order_with_one_wake_up_for_all_that_lie_there() -> None:
    async def main() -> None:
        feed, woken = Feed(1000, lambda: None), []
        loop = asyncio.get_running_loop()
        real = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *a: woken.append(1) or real(*a)  # type: ignore[method-assign, assignment]
        sinks = [feed.sink(0), feed.sink(1)]
        on_thread(lambda: [sinks[i % 2](Token(i)) for i in range(100)])
        assert await feed.take() == [(i % 2, Token(i)) for i in range(100)]
        assert len(woken) == 1
        on_thread(lambda: sinks[0](End("stop")))
        assert await feed.take() == [(0, End("stop"))]
        assert len(woken) == 2

    asyncio.run(main())


def test_no_event_is_lost_between_two_threads() -> None:
    async def main() -> None:
        feed, found = Feed(10**6, lambda: None), []
        sink = feed.sink(0)
        writer = threading.Thread(target=lambda: [sink(Token(i)) for i in range(20_000)])
        writer.start()
        while len(found) < 20_000:
            found += await asyncio.wait_for(feed.take(), 5)
        writer.join()
        assert [event.id for _, event in found if isinstance(event, Token)] == list(range(20_000))

    asyncio.run(main())


def test_a_reader_that_lets_too_much_lie_is_given_up_once() -> None:
    async def main() -> None:
        given_up: list[int] = []
        feed = Feed(5, lambda: given_up.append(1))
        sink = feed.sink(0)
        on_thread(lambda: [sink(Token(i)) for i in range(6)])
        await asyncio.sleep(0)
        on_thread(lambda: [sink(Token(i)) for i in range(100)])
        assert await feed.take() == []
        assert feed.full
        assert given_up == [1]

    asyncio.run(main())


def test_a_sink_outlives_its_loop_in_silence() -> None:
    async def main() -> Any:
        return Feed(5, lambda: None).sink(0)

    asyncio.run(main())(Token(1))
