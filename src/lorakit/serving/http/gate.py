"""The gate in front of every route: who may pass, how much, how slowly, and what is counted of it.

It stands before anything is parsed, so that a stranger's bytes meet as little code as possible: no key, no body.
Nothing here needs a web framework; it speaks ASGI.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from lorakit.errors import AccessError
from lorakit.serving.keys import ANYONE, Key, Keys, Scope
from lorakit.serving.metrics import Metrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

log = logging.getLogger("lorakit.serving")
GONE = 499
"""The code under which a client that went away is counted; nobody receives it."""
_OPEN = ("/health", "/ready", "/docs", "/openapi.json")
_SCOPES: tuple[tuple[str, Scope], ...] = (
    ("/admin", "admin"),
    ("/v1/load_lora_adapter", "admin"),
    ("/v1/unload_lora_adapter", "admin"),
    ("/metrics", "metrics"),
)
_ANSWERS = ("/v1/completions", "/v1/chat/completions", "/generate", "/generate_stream")
_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)


@dataclass(frozen=True)
class Bounds:
    """What one client may take: bytes of a body, and seconds to send it and to take what is sent."""

    body_bytes: int = 4 << 20
    read_seconds: float = 30.0
    write_seconds: float = 30.0


@dataclass
class Visit:
    """One request on its way through: what the gate and the routes tell each other."""

    id: str
    key: Key = ANYONE
    adapter: str = ""
    digest: str | None = None
    answer: str = ""
    code: int = 0
    started: bool = False
    finished: bool = False
    own: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Part of the answer's id, which no client chooses: an engine wants each once."""
    closing: list[Callable[[], None]] = field(default_factory=list)
    """Called when the request is over, however it went."""

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return what every answer carries."""
        told = {"x-request-id": self.id, "x-content-type-options": "nosniff"}
        if self.adapter:
            told |= {"x-lora-adapter": self.adapter, "x-lora-digest": self.digest or "none"}
            told["x-response-id"] = self.answer
        return [(name.encode(), value.encode("latin-1", "replace")) for name, value in told.items()]


class Refused(Exception):
    """A request that does not pass."""

    def __init__(self, code: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.code, self.kind = code, kind


class _Slow(Exception):
    """A client that does not take what is sent."""


class Gate:
    """Wraps an ASGI application; refuses with OpenAI's shape of an error.

    Args:
        app: what stands behind.
        keys: who may pass.
        metrics: counts answers by adapter and code.
        bounds: what one client may take.
    """

    def __init__(self, app: App, keys: Keys, metrics: Metrics, bounds: Bounds) -> None:
        self._app, self._keys, self._metrics, self._bounds = app, keys, metrics, bounds

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        asked = headers.get(b"x-request-id", b"").decode("latin-1")
        visit = Visit(asked if _ID.fullmatch(asked) else f"request-{uuid.uuid4().hex}")
        scope.setdefault("state", {})["visit"] = visit
        sending = self._sending(visit, send)
        try:
            visit.key = self._admitted(scope["path"], headers)
            body = await self._body(headers, receive, 0 if scope["path"] in _OPEN else self._bounds.body_bytes)
            await self._app(scope, _replayed(body, receive), sending)
        except Refused as refused:
            visit.code = refused.code
            if refused.code != GONE:
                await _refuse(sending, refused)
        except _Slow:
            visit.code = GONE
            log.warning("%s: the client took nothing for %g s and was cut off", visit.id, self._bounds.write_seconds)
        except Exception:
            log.exception("%s: an unexpected error", visit.id)
            visit.code = 500
            if visit.started:
                raise  # the server closes the connection: half an answer must not look whole
            await _refuse(sending, Refused(500, "server_error", f"an unexpected error; its id is {visit.id}"))
        except asyncio.CancelledError:
            visit.code = GONE
            raise
        finally:
            for close in visit.closing:
                close()
            if scope["path"] in _ANSWERS:
                whole = visit.finished or visit.code != 200
                self._metrics.request(visit.adapter or "none", visit.code if whole else GONE)

    def _admitted(self, path: str, headers: MutableMapping[bytes, bytes]) -> Key:
        if path in _OPEN:
            return ANYONE
        needed = next((scope for start, scope in _SCOPES if path == start or path.startswith(f"{start}/")), "infer")
        kind, _, secret = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        try:
            key = self._keys.find(secret.strip() if kind.lower() == "bearer" else None)
        except AccessError as refused:
            raise Refused(401, "invalid_api_key", str(refused)) from None
        try:
            key.need(needed)  # type: ignore[arg-type]
        except AccessError as refused:
            raise Refused(403, "permission_denied", str(refused)) from None
        return key

    async def _body(self, headers: MutableMapping[bytes, bytes], receive: Receive, most: int) -> bytes:
        """Return the whole body, which is bounded in bytes and in time."""
        stated = headers.get(b"content-length", b"0")
        large = Refused(413, "body_too_large", f"the body is larger than {most:,} bytes; send less at once")
        if not stated.isdigit() or int(stated[:20]) > most:
            raise large
        pieces, size = [], 0

        async def read() -> bytes:
            nonlocal size
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(GONE, "gone", "the client went away")
                size += len(message.get("body", b""))
                if size > most:
                    raise large
                pieces.append(message.get("body", b""))
                if not message.get("more_body", False):
                    return b"".join(pieces)

        try:
            return await asyncio.wait_for(read(), self._bounds.read_seconds)
        except asyncio.TimeoutError:
            late = f"the body did not arrive within {self._bounds.read_seconds:g} s"
            raise Refused(408, "body_too_slow", late) from None

    def _sending(self, visit: Visit, send: Send) -> Send:
        """Return a `send` that adds the headers and gives a client up that takes nothing."""

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.started, visit.code = True, visit.code or message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *visit.headers()]}
            await _within(self._bounds.write_seconds, send(message))
            visit.finished |= message["type"] == "http.response.body" and not message.get("more_body", False)

        return sending


async def _within(seconds: float, sent: Awaitable[None]) -> None:
    """Await what is nearly always done at once; a task of its own for each token would cost more than the token."""
    task, late = asyncio.current_task(), False
    assert task is not None

    def cut() -> None:
        nonlocal late
        late = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, cut)
    try:
        await sent
    except asyncio.CancelledError:
        if not late:
            raise
        with suppress(AttributeError):  # Python 3.10 keeps no count of cancels
            task.uncancel()
        raise _Slow from None
    finally:
        timer.cancel()


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body once, and then what the client does."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def _refuse(send: Send, refused: Refused) -> None:
    kind = "server_error" if refused.code >= 500 else "invalid_request_error"
    error = {"message": str(refused), "type": kind, "param": None, "code": refused.kind}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refused.code == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    with suppress(_Slow):
        await send({"type": "http.response.start", "status": refused.code, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})
