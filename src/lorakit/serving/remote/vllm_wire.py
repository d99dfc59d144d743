"""What is said to a vLLM server over HTTP, and what it says back; nothing is decided here.

vLLM's OpenAI server takes token ids as a prompt and gives them back with `return_token_ids`; adapters come and go by
/v1/load_lora_adapter and /v1/unload_lora_adapter, and /v1/models tells which are there. Read in vLLM 0.32.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from lorakit.core.jsontext import JsonFault, parse_json
from lorakit.errors import RequestError, ServingError
from lorakit.serving.requests import Request, Token

CONNECT = 5.0
"""Seconds a connection may take."""
ANSWER = 60.0
"""Seconds a load or a list may take."""
SILENCE = 600.0
"""Seconds between two tokens after which an answer is given up."""
MOST_BIAS = 100.0
"""vLLM cuts a logit's bias to this, unsaid."""
_LONGEST = 64 << 20  # bytes of one line or answer; the first line of a stream repeats the prompt
_SEEDS = 1 << 63


class Refused(Exception):
    """What vLLM said no to: the HTTP status, and its message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass(frozen=True)
class Card:
    """One model of /v1/models: the base has no parent, an adapter's root is its folder."""

    id: str
    root: str | None
    parent: str | None
    context: int | None


class Wire:
    """Calls of one vLLM server; each opens a connection of its own.

    Raises:
        ServingError: an address that is none.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ServingError(f"{url!r} is no address of a server; write it as http://127.0.0.1:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._https, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._path = urlsplit(self.url).path.rstrip("/")
        self._headers = {"content-type": "application/json", "accept": "application/json"}
        if api_key is not None:
            self._headers["authorization"] = f"Bearer {api_key}"

    def cards(self) -> list[Card]:
        """Return the models that are there now."""
        found = self._call("GET", "/v1/models")
        try:
            return [Card(str(one["id"]), one.get("root"), one.get("parent"), one.get("max_model_len"))
                    for one in found["data"]]  # fmt: skip
        except (TypeError, KeyError, AttributeError):
            raise ServingError(f"{self.url}/v1/models is no list of models; is it a vLLM server?") from None

    def load(self, name: str, path: str) -> None:
        """Load the adapter in a folder that the server sees under the same path."""
        self._call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    def unload(self, name: str) -> None:
        """Forget an adapter; what runs with it goes on."""
        self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def stream(self, body: Mapping[str, Any], breaks: Callable[[Callable[[], None]], None]) -> Iterator[dict[str, Any]]:
        """Yield the chunks of a streamed completion; `breaks` is given what ends it from another thread."""
        with self._reaching():
            connection = self._connection()
            connection.connect()
            link: socket.socket = connection.sock
            breaks(lambda: _shut(link))
            link.settimeout(SILENCE)
            try:
                answer = self._sent(connection, "POST", "/v1/completions", body)
                while line := answer.readline(_LONGEST):
                    kind, _, data = line.partition(b":")
                    if kind != b"data":
                        continue
                    if data.strip() == b"[DONE]":
                        return
                    yield _parsed(data)
            finally:
                connection.close()
                link.close()

    def _call(self, verb: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        with self._reaching():
            connection = self._connection()
            try:
                connection.connect()
                connection.sock.settimeout(ANSWER)
                text = self._sent(connection, verb, path, body).read(_LONGEST)
                return _parsed(text) if text.lstrip().startswith(b"{") else None
            finally:
                connection.close()

    def _connection(self) -> HTTPConnection:
        kind = HTTPSConnection if self._https else HTTPConnection
        return kind(self._host, self._port, timeout=CONNECT)

    def _sent(self, link: HTTPConnection, verb: str, path: str, body: Mapping[str, Any] | None) -> HTTPResponse:
        link.request(verb, self._path + path, None if body is None else json.dumps(body), self._headers)
        answer = link.getresponse()
        if answer.status != 200:
            raise Refused(answer.status, _message(answer.read(_LONGEST)))
        return answer

    def _reaching(self) -> _Reaching:
        return _Reaching(self.url)


class _Reaching:
    """Says of a broken connection whose it was; what vLLM itself said passes."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (OSError, HTTPException, JsonFault)):
            what = str(error) or type(error).__name__
            raise Unreached(f"vLLM at {self.url} does not answer ({what}); is it running?") from error


class Unreached(ServingError):
    """A server that nobody answers at, or whose answer broke off."""


def body_of(request: Request, model: str, context: int, stops: frozenset[int]) -> dict[str, Any]:
    """Return a request in vLLM's words, everything said, so that no default of the server's steps in.

    Raises:
        RequestError: what vLLM has no word for.
    """
    s = request.sampling
    if request.scale != 1.0 and request.adapter is not None:
        raise RequestError(f"the scale is {request.scale:g}, and vLLM serves adapters as trained; leave it at 1")
    if wild := [(t, b) for t, b in s.logit_bias.items() if not abs(b) <= MOST_BIAS]:
        raise RequestError(f"logit_bias of token {wild[0][0]} is {wild[0][1]}; vLLM takes -100 to 100")
    if s.seed is not None and not -_SEEDS <= s.seed < _SEEDS:
        raise RequestError(f"seed is {s.seed}; vLLM takes whole numbers of 64 bits")
    return {
        "model": model, "prompt": list(request.prompt), "stream": True, "return_token_ids": True, "n": 1,
        "max_tokens": min(s.max_tokens, context - len(request.prompt)), "temperature": s.temperature,
        "top_p": s.top_p, "top_k": s.top_k or -1, "min_p": 0.0, "seed": s.seed, "repetition_penalty": 1.0,
        "frequency_penalty": s.frequency_penalty, "presence_penalty": s.presence_penalty,
        "logit_bias": {str(t): b for t, b in s.logit_bias.items()} or None, "logprobs": s.logprobs,
        "return_tokens_as_token_ids": True, "ignore_eos": s.ignore_eos,
        "stop_token_ids": [] if s.ignore_eos else sorted(stops), "add_special_tokens": False,
    }  # fmt: skip


def tokens_of(choice: Mapping[str, Any], asked: int | None) -> list[Token]:
    """Return the tokens of one chunk, with the log-probabilities that were asked for."""
    ids = choice.get("token_ids")
    if ids is None:
        raise ServingError("vLLM sent text without token ids; it is too old for return_token_ids: upgrade it")
    told = choice.get("logprobs")
    if asked is None or told is None:
        return [Token(int(one)) for one in ids]
    rows = zip(ids, told["token_logprobs"], told["top_logprobs"], strict=True)
    return [Token(int(one), value, _likeliest(top or {}, asked)) for one, value, top in rows]


def _likeliest(top: Mapping[str, float], count: int) -> tuple[tuple[int, float], ...]:
    """Return the `count` likeliest of `{"token_id:7": -0.5}`, which has the chosen token besides."""
    found = [(int(name.removeprefix("token_id:")), value) for name, value in top.items()]
    return tuple(sorted(found, key=lambda pair: -pair[1])[:count])


def _message(text: bytes) -> str:
    """Return the message in an answer of an error, in one line."""
    with suppress(JsonFault, AttributeError):
        found = parse_json(text)
        inner = found.get("error", found)
        message = inner.get("message", inner.get("detail")) if isinstance(inner, dict) else inner
        if isinstance(message, str):
            return " ".join(message.split())[:2000]
    return " ".join(text[:500].decode(errors="replace").split()) or "without a reason"


def _parsed(data: bytes) -> dict[str, Any]:
    found = parse_json(data)
    if not isinstance(found, dict):
        raise JsonFault("not an object")
    if isinstance(wrong := found.get("error"), dict):
        raise Refused(int(wrong.get("code") or 500), str(wrong.get("message")))
    return found


def _shut(link: socket.socket) -> None:
    """End a connection from another thread, whose reading then ends; vLLM sees it and stops."""
    with suppress(OSError):
        link.shutdown(socket.SHUT_RDWR)
