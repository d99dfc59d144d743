"""Clients that go away, read slowly or write slowly, and answers that are interrupted: spoken in plain ASGI."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.serving.requests import End, Request, Sink, Token
from tests.serving.echo import EchoEngine
from tests.serving.web import Server, client, events, listening, server

pytest.importorskip("fastapi", reason="needs lorakit[serve]")

LONG = {"model": "first", "prompt": "a fox", "max_tokens": 3000, "ignore_eos": True}


class Visitor:
    """One request to the application, whose client may go away (`leave`) or take nothing (`read.clear`)."""

    def __init__(self, made: Server, path: str = "/v1/completions", body: Any = None, **bounds: Any) -> None:
        from lorakit.serving.http import Bounds, app

        self._app, self._path = app(made.service, None, Bounds(**bounds)), path
        self._body = [json.dumps(body).encode()] if body is not None else []
        self.leave, self.read = asyncio.Event(), asyncio.Event()
        self.read.set()
        self.sent: list[Any] = []

    @property
    def status(self) -> int | None:
        return next((m["status"] for m in self.sent if m["type"] == "http.response.start"), None)

    @property
    def text(self) -> str:
        return b"".join(m.get("body", b"") for m in self.sent).decode()

    async def go(self) -> None:
        scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
                 "method": "POST", "path": self._path, "raw_path": self._path.encode(), "query_string": b"",
                 "headers": [(b"content-type", b"application/json")], "scheme": "http", "server": ("here", 80),
                 "client": ("there", 1), "root_path": ""}  # fmt: skip
        await self._app(scope, self._receive, self._send)

    async def _receive(self) -> Any:
        if self._body:
            return {"type": "http.request", "body": self._body.pop(), "more_body": False}
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        await self.read.wait()


async def until(fine: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not fine() and time.monotonic() < end:
        await asyncio.sleep(0.005)
    assert fine()


def idle(made: Server) -> bool:
    stats = made.engine.stats()
    return not stats.running and not stats.waiting and not made.service.open and not made.registry.usage().in_use


def counted(made: Server, code: int) -> bool:
    return f'code="{code}"' in made.service.metrics.text().decode()


def run(place: Path, story: Callable[[Server], Awaitable[None]], **options: Any) -> None:
    with server(place, {"first": 1.5}, **options) as made:
        asyncio.run(story(made))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_the_engine_s_request(tmp_path: Path, stream: bool) -> None:
    async def story(made: Server) -> None:
        visitor = Visitor(made, body={**LONG, "stream": stream})
        going = asyncio.create_task(visitor.go())
        await until(lambda: made.engine.stats().generated_tokens > 5)
        visitor.leave.set()
        await asyncio.wait_for(going, 5)
        await until(lambda: idle(made))
        assert made.engine.stats().generated_tokens < 3000
        assert counted(made, 499)

    run(tmp_path, story, step_seconds=0.002)


def test_a_client_that_goes_away_during_a_load_leaves_nothing_pinned(tmp_path: Path) -> None:
    async def story(made: Server) -> None:
        made.engine.load_seconds = 0.3
        made.registry.names.point("cold", made.registry.store.add(made.folder / "two").digest)
        visitor = Visitor(made, body={**LONG, "model": "cold"})
        going = asyncio.create_task(visitor.go())
        await asyncio.sleep(0.05)
        visitor.leave.set()
        await asyncio.wait_for(going, 5)
        await asyncio.sleep(0.4)
        await until(lambda: idle(made))
        assert made.engine.submitted == []

    run(tmp_path, story)


def test_a_client_that_takes_nothing_is_cut_off(tmp_path: Path) -> None:
    async def story(made: Server) -> None:
        visitor = Visitor(made, body={**LONG, "stream": True}, write_seconds=0.2)
        visitor.read.clear()
        await asyncio.wait_for(visitor.go(), 5)
        await until(lambda: idle(made))
        assert counted(made, 499)

    run(tmp_path, story, step_seconds=0.002)


def test_what_a_client_leaves_unread_is_bounded_and_then_its_stream_ends(tmp_path: Path) -> None:
    async def story(made: Server) -> None:
        visitor = Visitor(made, body={**LONG, "stream": True})
        visitor.read.clear()
        going = asyncio.create_task(visitor.go())
        await until(lambda: made.engine.stats().generated_tokens > 5)
        await until(lambda: idle(made))
        assert made.engine.stats().generated_tokens < 500
        assert not going.done()
        visitor.read.set()
        await asyncio.wait_for(going, 5)
        assert events(visitor.text)[-1]["error"]["code"] == "slow_client"

    run(tmp_path, story, step_seconds=0.001, most_unread=20)


def test_a_body_that_does_not_arrive_is_408(tmp_path: Path) -> None:
    async def story(made: Server) -> None:
        visitor = Visitor(made, read_seconds=0.1)
        await asyncio.wait_for(visitor.go(), 5)
        assert visitor.status == 408

    run(tmp_path, story)


def test_the_deadline_is_504_or_the_last_event_of_a_stream(tmp_path: Path) -> None:
    async def story(made: Server) -> None:
        with made.engine.hold():
            whole = Visitor(made, body=LONG)
            await asyncio.wait_for(whole.go(), 5)
        assert whole.status == 504
        assert json.loads(whole.text)["error"]["code"] == "timeout"
        stream = Visitor(made, body={**LONG, "stream": True})
        await asyncio.wait_for(stream.go(), 5)
        assert stream.status == 200
        assert events(stream.text)[-1]["error"]["code"] == "timeout"
        await until(lambda: idle(made))
        assert counted(made, 504)

    run(tmp_path, story, timeout=0.15, step_seconds=0.01)


def test_an_engine_that_forgets_the_deadline_is_reminded(tmp_path: Path) -> None:
    from lorakit.serving.answer import Interrupted
    from lorakit.serving.service import Question

    async def story(made: Server) -> None:
        class Deaf(EchoEngine):
            def submit(self, request: Request, sink: Sink) -> None:
                pass

        made.service.engine = Deaf(vocabulary=4096)
        answer = await made.service.ask(Question("tales", prompt="a fox"))
        with pytest.raises(Interrupted, match="longer than this server's timeout"):
            async for _ in answer.pieces():
                pass
        made.service.engine.close()

    run(tmp_path, story, timeout=0.1)


def test_an_engine_s_failure_is_an_event_of_the_stream_and_500_else(tmp_path: Path) -> None:
    async def story(made: Server) -> None:
        class Failing(EchoEngine):
            def submit(self, request: Request, sink: Sink) -> None:
                sink(Token(5))
                sink(End("error", "not a number in layer 3"))

        made.service.engine = Failing(vocabulary=4096)
        asked = {**LONG, "model": "tales"}
        stream, whole = Visitor(made, body={**asked, "stream": True}), Visitor(made, body=asked)
        await stream.go()
        await whole.go()
        assert events(stream.text)[-1]["error"]["message"] == "not a number in layer 3"
        assert "[DONE]" not in stream.text
        assert whole.status == 500
        assert counted(made, 500)
        made.service.engine.close()

    run(tmp_path, story)


def test_an_engine_that_stops_is_503(tmp_path: Path) -> None:
    async def story(made: Server) -> None:
        visitor = Visitor(made, body=LONG)
        going = asyncio.create_task(visitor.go())
        await until(lambda: made.engine.stats().running == 1)
        await asyncio.to_thread(made.engine.close)
        await asyncio.wait_for(going, 5)
        assert visitor.status == 503

    run(tmp_path, story, step_seconds=0.005)


def test_too_many_are_429_with_a_time_and_none_of_them_stays(tmp_path: Path) -> None:
    async def story(made: Server) -> None:
        with made.engine.hold():
            first = asyncio.create_task(Visitor(made, body=LONG).go())
            await until(lambda: made.engine.stats().running == 1)
            second = asyncio.create_task(Visitor(made, body=LONG).go())
            await until(lambda: made.engine.stats().waiting == 1)
            late = Visitor(made, body={**LONG, "n": 2})
            await late.go()
            assert late.status == 429
            headers = dict(late.sent[0]["headers"])
            assert int(headers[b"retry-after"]) >= 1
            await until(lambda: made.engine.stats().waiting == 1)
            more = Visitor(made, body={**LONG, "n": 3})
            await more.go()
            assert more.status == 400, "the queue never holds as many, so there is no use in trying again"
            feedback = made.service.feedback
            assert feedback is not None
            made.service._notes.submit(lambda: None).result()
            assert not feedback.summary()
            first.cancel()
            second.cancel()
            await asyncio.gather(first, second, return_exceptions=True)
        await until(lambda: idle(made))

    run(tmp_path, story, slots=1, queue=2)


def test_a_slow_load_keeps_nobody_else_waiting(tmp_path: Path) -> None:
    async def story(made: Server) -> None:
        made.registry.names.point("cold", made.registry.store.add(made.folder / "two").digest)
        made.engine.load_seconds = 0.5
        cold = [Visitor(made, body={"model": "cold", "prompt": "Hi"}) for _ in range(40)]
        going = asyncio.gather(*(one.go() for one in cold))
        await asyncio.sleep(0.05)
        started = time.monotonic()
        for _ in range(3):
            warm = Visitor(made, body={"model": "first", "prompt": "Hi"})
            await warm.go()
            assert warm.status == 200
        assert time.monotonic() - started < 0.35
        assert not going.done()
        await going
        assert {one.status for one in cold} == {200}

    run(tmp_path, story)


def test_draining_finishes_what_runs_and_refuses_what_comes(tmp_path: Path) -> None:
    async def story(made: Server) -> None:
        running = Visitor(made, body={**LONG, "max_tokens": 50})
        going = asyncio.create_task(running.go())
        await until(lambda: made.service.open == 1)
        drain = Visitor(made, "/admin/drain", {})
        await drain.go()
        assert json.loads(drain.text) == {"draining": True, "open": 1}
        late = Visitor(made, body=LONG)
        await late.go()
        assert late.status == 503
        await asyncio.wait_for(going, 5)
        await until(lambda: made.service.open == 0)
        assert running.status == 200
        assert not made.service.ready

    run(tmp_path, story, step_seconds=0.002)


def test_tokens_after_a_stop_string_are_not_counted(tmp_path: Path) -> None:
    from lorakit.serving.service import Question

    async def story(made: Server) -> None:
        answer = await made.service.ask(Question("tales", prompt="one two. three. four", stops=(".",), max_tokens=100))
        await until(lambda: made.engine.stats().running == 0)  # all of it lies in the feed
        found = [piece async for pieces in answer.pieces() for piece in pieces]
        assert found[-1].matched
        assert answer.completion_tokens == sum(len(piece.tokens) for piece in found) < 5
        assert answer.reason == "stop"

    run(tmp_path, story)


def test_a_stop_string_ends_the_engine_s_request(tmp_path: Path) -> None:
    async def story(made: Server) -> None:
        visitor = Visitor(made, body={**LONG, "stop": "fox"})
        await visitor.go()
        assert json.loads(visitor.text)["choices"][0]["finish_reason"] == "stop"
        await until(lambda: made.engine.stats().running == 0)
        assert made.engine.stats().generated_tokens < 100

    run(tmp_path, story, step_seconds=0.002)


def test_a_real_connection_that_closes_ends_the_engine_s_request(tmp_path: Path) -> None:
    import http.client

    with server(tmp_path, {"first": 1.5}, step_seconds=0.003) as made, listening(made) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        body, headers = json.dumps({**LONG, "stream": True}), {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", body, headers)
        answer = connection.getresponse()
        assert answer.readline().startswith(b"data: ")
        answer.close()
        connection.close()
        asyncio.run(until(lambda: idle(made)))
        assert made.engine.stats().generated_tokens < 2500


def test_a_port_that_is_taken_is_said_so(tmp_path: Path) -> None:
    import socket

    from lorakit.errors import ServingError
    from lorakit.serving.http import app
    from lorakit.serving.http import run as listen

    with server(tmp_path) as made, socket.socket() as taken, client(made):
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ServingError, match="choose another port"):
            listen(app(made.service), port=taken.getsockname()[1])
