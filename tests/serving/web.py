"""A whole server for tests, but for its engine: the bundled base's tokenizer, tiny adapters, and echoes for answers."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lorakit.serving.feedback import Feedback
from lorakit.serving.keys import Keys
from lorakit.serving.metrics import Metrics
from lorakit.serving.service import Service
from lorakit.serving.shelf.names import Names
from lorakit.serving.shelf.registry import Registry
from lorakit.serving.shelf.store import Store
from tests.serving.adapters import folder_of
from tests.serving.echo import EchoEngine

TALES = Path(__file__).parents[2] / "src" / "lorakit" / "assets" / "tales"
BASE = "tales"


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TALES)


def backwards(text: str) -> str:
    """Return what the engine answers to a prompt: its tokens in reverse."""
    return str(tokenizer().decode(tokenizer()(text)["input_ids"][::-1]))


@dataclass(frozen=True)
class Server:
    """A server's parts; `folder` is where adapters may come from, and holds `one` and `two`."""

    service: Service
    engine: EchoEngine
    registry: Registry
    folder: Path


@contextmanager
def server(place: Path, adapters: Mapping[str, float] | None = None, **options: Any) -> Iterator[Server]:
    """Run a server in a folder; adapters are served from the start; options are the service's or the engine's."""
    mine = {name: options.pop(name) for name in ("timeout", "most_unread") if name in options}
    engine = EchoEngine(**{"vocabulary": 4096, **options})
    folder = place / "adapters"
    for name, value in {"one": 1.0, "two": 2.0, **(adapters or {})}.items():
        folder_of(folder / name, value)
    registry = Registry(engine, Store(place / "store"), Names(place / "names.json", [BASE]), memory=1 << 20,
                        roots=[folder])  # fmt: skip
    for name in adapters or {}:
        registry.add(name, folder / name)
    feedback, metrics = Feedback(place / "feedback.sqlite"), Metrics()
    metrics.watch(engine, registry.usage)
    service = Service(engine, registry, tokenizer(), metrics=metrics, feedback=feedback, **mine)
    service.warm = True
    try:
        yield Server(service, engine, registry, folder)
    finally:
        service.close()
        engine.close()
        feedback.close()


@contextmanager
def client(made: Server, keys: Keys | None = None, **bounds: Any) -> Iterator[Any]:
    """Give a client of a server's web application, without a network."""
    testclient = pytest.importorskip("fastapi.testclient", reason="needs lorakit[serve]")
    from lorakit.serving.http import Bounds, app

    with testclient.TestClient(app(made.service, keys, Bounds(**bounds)), raise_server_exceptions=False) as opened:
        yield opened


@contextmanager
def listening(made: Server) -> Iterator[int]:
    """Listen at a free port of this machine, and give the port."""
    pytest.importorskip("uvicorn", reason="needs lorakit[serve]")
    from lorakit.serving.http import app, run

    told: queue.Queue[tuple[int, Callable[[], None]]] = queue.Queue()
    thread = threading.Thread(
        target=lambda: run(app(made.service), port=0, ready=lambda port, stop: told.put((port, stop)))
    )
    thread.start()
    port, stop = told.get(timeout=20)
    try:
        yield port
    finally:
        stop()
        thread.join(20)
        assert not thread.is_alive()


def events(text: str) -> list[Any]:
    """Return the data of server-sent events, as JSON where it is."""
    data = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [json.loads(one) if one != "[DONE]" else one for one in data]
