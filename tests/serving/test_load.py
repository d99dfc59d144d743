"""A load asks what it says it asks, and counts what its clients saw."""

from __future__ import annotations

import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import ServingError
from lorakit.serving.load import Load, Seen, asks, drive, served
from tests.cli.conftest import answer, invoke
from tests.serving.web import BASE, listening, server


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of echoes with two adapters."""
    with server(tmp_path_factory.mktemp("load"), {"one": 1.0, "two": 2.0}) as made, listening(made) as port:
        yield f"http://127.0.0.1:{port}"


def test_a_closed_load_is_answered_whole(url: str) -> None:
    found = drive(Load(url, ("one", "two", BASE), requests=30, clients=4, prompt=(3, 5), answer=(2, 4)))
    said = found.summary()
    assert (said["answered"], said["failed"]) == (30, {})
    assert set(found.tokens) == {"one", "two", BASE}
    assert 60 <= sum(found.tokens.values()) <= 120
    assert said["first_token_ms"]["p50"] <= said["answer_ms"]["p50"]


def test_an_open_load_counts_from_when_a_request_was_due(url: str) -> None:
    load = Load(url, ("one",), requests=10, rate=50.0, prompt=(3, 3), answer=(2, 2))
    found = drive(load)
    assert len(found.whole) == 10
    assert found.seconds >= max(ask.at for ask in asks(load))


def test_failures_are_counted_by_what_was_said(url: str) -> None:
    found = drive(Load(url, ("nobody",), requests=3, clients=1))
    ((said, count),) = found.failed.items()
    assert count == 3
    assert said.startswith("404 'nobody' is not served here")
    assert found.summary()["answered"] == 0
    half = drive(Load(url, ("one", "nobody"), requests=12, clients=1)).summary()
    assert half["failed"]
    assert half["answered"]
    assert half["fairness"] == 0.5, "who got nothing counts"


def test_a_server_tells_its_base_from_its_adapters(url: str) -> None:
    assert served(url) == [(BASE, False), ("one", True), ("two", True)]
    with pytest.raises(ServingError, match=r"nobody answers at http://127.0.0.1:9"):
        served("http://127.0.0.1:9")
    with pytest.raises(ServingError, match="is no address of a server"):
        served("ftp://there")


@pytest.mark.parametrize("url", ["http://127.0.0.1:abc", "http://127.0.0.1:99999", "//"])
def test_what_is_no_address_is_said_to_be_none(url: str) -> None:
    refused = invoke("bench", "serve", url)
    assert refused.exit_code == 2
    assert "is no address of a server" in refused.stderr
    assert "no header can carry" in invoke("bench", "serve", "http://127.0.0.1:9", "--key", "schl\u00fcssel").stderr


@pytest.mark.parametrize("words", [b"SSH-2.0-x\r\n", b'HTTP/1.1 200 OK\r\n\r\ndata: {"choices": [{"text": "a"}]}\n\n'])
def test_another_kind_of_server_and_an_answer_that_breaks_off_are_told(words: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]

        def speak() -> None:
            for _ in range(2):
                visitor, _ = listening.accept()
                with visitor:
                    visitor.settimeout(0.2)
                    with suppress(TimeoutError):  # all of it: what is left unread would reset the connection
                        while visitor.recv(1 << 16):
                            pass
                    visitor.sendall(words)

        speaker = threading.Thread(target=speak, daemon=True)
        speaker.start()
        with pytest.raises(ServingError, match="answers, but not as a server of OpenAI's API does"):
            served(f"http://127.0.0.1:{port}")
        ((why, count),) = drive(Load(f"http://127.0.0.1:{port}", ("a",), requests=1)).failed.items()
        speaker.join(5)
    assert count == 1
    assert why.startswith("BadStatusLine" if words.startswith(b"SSH") else "the answer broke off")


@given(st.integers(0, 5), st.integers(1, 40))
def test_the_same_seed_asks_the_same(seed: int, requests: int) -> None:
    load = Load("x", ("a", "b"), requests=requests, rate=5.0, seed=seed)
    first = list(asks(load))
    assert first == list(asks(load))
    assert len(first) == requests
    assert [ask.at for ask in first] == sorted(ask.at for ask in first)
    assert all(8 <= len(ask.prompt.split()) <= 64 and 16 <= ask.tokens <= 64 for ask in first)


def test_zipf_asks_the_second_half_as_often_as_the_first() -> None:
    counts = Counter(ask.model for ask in asks(Load("x", ("a", "b", "c"), requests=11_000, zipf=1.0)))
    assert counts["a"] / counts["b"] == pytest.approx(2, rel=0.1)
    assert counts["a"] / counts["c"] == pytest.approx(3, rel=0.1)


def test_fairness_by_hand() -> None:
    assert Seen(tokens={"a": 10, "b": 10}).summary()["fairness"] == 1.0
    assert Seen(tokens={"a": 30, "b": 10}).summary()["fairness"] == 40**2 / (2 * (900 + 100))


def test_the_verb_says_what_it_measured_and_refuses_what_is_not_there(url: str) -> None:
    found = answer("bench", "serve", url, "--requests", "8", "--clients", "2", "--answer", "2", "--json")
    assert found["models"] == ["one", "two"]
    assert found["answered"] == 8
    shown = invoke("bench", "serve", url, "--requests", "4", "--adapters", "0", "--answer", "2-3")
    assert shown.exit_code == 0
    assert "4 answered in" in shown.stdout
    assert "first token" in shown.stdout
    for words, why in (
        (("--adapters", "3"), "the server has 2 adapters, not 3"),
        (("--prompt", "many"), "--prompt is 'many'; give a number such as 32, or two such as 8-64"),
        (("--answer", "9-3"), "--answer is '9-3'"),
    ):
        refused = invoke("bench", "serve", url, *words)
        assert refused.exit_code == 2
        assert why in refused.stderr


def test_a_load_of_which_nothing_is_answered_ends_with_1(url: str) -> None:
    long = invoke("bench", "serve", url, "--requests", "2", "--prompt", "5000", "--json")
    assert long.exit_code == 1
    assert json.loads(long.stdout)["answered"] == 0
