"""A load on any server of OpenAI's completions, and what its clients saw of it.

A closed load keeps so many clients busy, each asking again once it has its answer; an open one sends requests at random
times, whether answers come or not, and counts from the moment a request was due, so that a server that stalls is not
forgiven the requests it kept from being sent. Only the standard library, so that the clients cost little.
"""

from __future__ import annotations

import http.client
import itertools
import json
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from lorakit.errors import ServingError
from lorakit.serving.percentiles import percentiles

WORDS = ("king", "daughter", "wood", "river", "gold", "stone", "wolf", "bread", "night", "road", "house", "tree")
MOST_OPEN = 256
"""Requests of an open load that may be under way; more are sent late, and count as late."""


@dataclass(frozen=True)
class Load:
    """What is asked of a server.

    Args:
        url: of the server, as `http://127.0.0.1:8000`.
        models: asked by name, the first the most often where `zipf` is above 0.
        requests: in all.
        clients: that ask at once, where `rate` is None.
        rate: requests a second, at random times (a Poisson process).
        zipf: model number k is asked with a share of `1 / k^zipf`; 0 asks all alike.
        prompt: the fewest and the most words of a prompt.
        answer: the fewest and the most tokens of an answer.
        key: of the API.
        seed: of all draws.
    """

    url: str
    models: tuple[str, ...]
    requests: int = 100
    clients: int = 16
    rate: float | None = None
    zipf: float = 0.0
    prompt: tuple[int, int] = (8, 64)
    answer: tuple[int, int] = (16, 64)
    key: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Ask:
    """One request of a load, due `at` seconds after its beginning."""

    model: str
    prompt: str
    tokens: int
    at: float = 0.0


@dataclass
class Seen:
    """What the clients saw."""

    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Return the numbers of a table: tokens and requests a second, p50 and p95 in milliseconds, and fairness.

        Fairness is Jain's index of the tokens each model got, `(sum x)^2 / (n sum x^2)`: 1 where all got the same.
        """
        shares = list(self.tokens.values())
        squares = len(shares) * sum(x * x for x in shares)
        return {
            "seconds": self.seconds,
            "requests_per_second": len(self.whole) / self.seconds if self.seconds else 0.0,
            "tokens_per_second": sum(shares) / self.seconds if self.seconds else 0.0,
            "first_token_ms": _milliseconds(self.first),
            "between_tokens_ms": _milliseconds(self.between),
            "answer_ms": _milliseconds(self.whole),
            "fairness": sum(shares) ** 2 / squares if squares else None,
            "answered": len(self.whole),
            "failed": dict(self.failed),
        }


def _milliseconds(seconds: Sequence[float]) -> dict[str, float] | None:
    found = percentiles(seconds)
    return None if found is None else {"p50": 1e3 * found[0], "p95": 1e3 * found[1]}


def asks(load: Load) -> Iterator[Ask]:
    """Yield the requests of a load, the same for the same seed."""
    rng, at = random.Random(load.seed), 0.0
    weights = [1 / (place**load.zipf) for place in range(1, len(load.models) + 1)]
    for _ in range(load.requests):
        (model,) = rng.choices(load.models, weights)
        prompt = " ".join(rng.choices(WORDS, k=rng.randint(*load.prompt)))
        at += rng.expovariate(load.rate) if load.rate else 0.0
        yield Ask(model, prompt, rng.randint(*load.answer), at)


def served(url: str, key: str | None = None) -> list[tuple[str, bool]]:
    """Return the models a server says it has, and whether each is an adapter.

    Raises:
        ServingError: nobody there, or not a server of this kind.
    """
    link = _link(url)
    try:
        link.request("GET", "/v1/models", headers=_headers(key))
        answer = link.getresponse()
        found = json.loads(answer.read())
        if answer.status != 200:
            raise ServingError(f"{url}/v1/models answers {answer.status}: {_said(found)}")
        return [(model["id"], model.get("parent") is not None) for model in found["data"]]
    except OSError as failed:
        raise ServingError(f"nobody answers at {url}: {failed}; start one: lorakit serve BASE") from failed
    except (ValueError, KeyError, TypeError, http.client.HTTPException) as failed:
        raise ServingError(f"{url} answers, but not as a server of OpenAI's API does") from failed
    finally:
        link.close()


def drive(load: Load) -> Seen:
    """Put a load on a server and return what its clients saw; a request that fails is counted, by what was said."""
    seen, lock, left = Seen(), threading.Lock(), asks(load)
    began = time.perf_counter()

    def work() -> None:
        while True:
            with lock:
                ask = next(left, None)
            if ask is None:
                return
            due = began + ask.at
            if load.rate is not None:
                time.sleep(max(0.0, due - time.perf_counter()))
            _one(load, ask, due if load.rate is not None else time.perf_counter(), seen, lock)

    count = min(load.requests, MOST_OPEN if load.rate is not None else load.clients)
    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen.seconds = time.perf_counter() - began
    return seen


def _one(load: Load, ask: Ask, began: float, seen: Seen, lock: threading.Lock) -> None:
    """Ask once, as a stream, and note what came and when."""
    body = {"model": ask.model, "prompt": ask.prompt, "max_tokens": ask.tokens, "temperature": 0, "stream": True,
            "ignore_eos": True, "stream_options": {"include_usage": True}}  # fmt: skip
    times: list[float] = []
    tokens, failed, whole = 0, None, False
    link = _link(load.url)
    try:
        link.request("POST", "/v1/completions", json.dumps(body), _headers(load.key))
        answer = link.getresponse()
        if answer.status != 200:
            failed = f"{answer.status} {_said(json.loads(answer.read()))}"
        for line in answer if failed is None else ():
            whole |= line.startswith(b"data: [DONE]")
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    failed = _said(event)
                elif usage := event.get("usage"):
                    tokens = usage["completion_tokens"]
                if any(choice.get("text") for choice in event.get("choices", ())):
                    times.append(time.perf_counter())
        if failed is None and not whole:
            failed = "the answer broke off"
    except (OSError, ValueError, http.client.HTTPException) as broken:
        failed = f"{type(broken).__name__}: {broken}"
    finally:
        link.close()
    with lock:
        seen.tokens.setdefault(ask.model, 0)
        if failed is not None:
            seen.failed[failed] = seen.failed.get(failed, 0) + 1
            return
        seen.whole.append(time.perf_counter() - began)
        seen.tokens[ask.model] += tokens
        seen.first += [times[0] - began] if times else []
        seen.between += [late - early for early, late in itertools.pairwise(times)]


def _link(url: str) -> http.client.HTTPConnection:
    try:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        host, port = parts.hostname, parts.port
    except ValueError:  # of a port that is no number, or none there can be
        host = None
    if host is None or parts.scheme not in ("http", "https"):
        raise ServingError(f"{url!r} is no address of a server; give one such as http://127.0.0.1:8000")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(host, port, timeout=600)


def _headers(key: str | None) -> dict[str, str]:
    return {"content-type": "application/json", **({} if key is None else {"authorization": f"Bearer {key}"})}


def _said(answer: Any) -> str:
    """Return the message of an error, whoever's shape it has."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(error.get("message", error) if isinstance(error, dict) else error)[:200]
