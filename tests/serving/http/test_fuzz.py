"""Requests that nobody would write: generated from the server's own description, none may be answered with 500."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.serving.web import Server, client, server

MODELS = st.sampled_from(["first", "tales", "first@live", "nobody", "", "a@b@c", "tales:first"])
NUMBERS = st.one_of(st.integers(-3, 3), st.integers(), st.floats(allow_nan=False), st.just(2**63))
ANY = st.recursive(st.none() | st.booleans() | NUMBERS | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)
                   | st.dictionaries(st.text(max_size=5), inner, max_size=2), max_leaves=4)  # fmt: skip
FIELDS = {
    "prompt": st.one_of(
        st.text(max_size=20), st.lists(st.text(max_size=5), max_size=3), st.lists(st.integers(-1, 5000))
    ),
    "messages": st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text(max_size=9)}
        ),
        max_size=3,
    ),
    "max_tokens": st.integers(0, 9),
    "n": st.integers(0, 3),
    "stop": st.one_of(st.text(max_size=3), st.lists(st.text(max_size=3), max_size=5)),
    "logprobs": st.one_of(st.booleans(), st.integers(-1, 21)),
    "top_logprobs": st.integers(0, 3),
    "stream": st.booleans(),
    "echo": st.booleans(),
    "seed": NUMBERS,
    "temperature": NUMBERS,
    "logit_bias": st.dictionaries(st.text("0123456789-a", max_size=5), NUMBERS, max_size=2),
    "lora_scale": NUMBERS,
    "adapter_id": MODELS,
    "user": st.text(max_size=5),
    "stream_options": st.just({"include_usage": True}),
}
BODIES = st.fixed_dictionaries(
    {"model": MODELS}, optional={name: st.one_of(v, v, v, ANY) for name, v in FIELDS.items()}
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("server"), {"first": 1.5}) as running:
        running.registry.point("first@live", "first")
        yield running


@pytest.fixture(scope="module")
def web(made: Server) -> Iterator[Any]:
    with client(made) as opened:
        yield opened


@settings(max_examples=150, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(["/v1/completions", "/v1/chat/completions"]), body=BODIES)
def test_no_question_breaks_the_server(web: Any, path: str, body: Any) -> None:
    try:
        answer = web.post(path, json=body)
    except (ValueError, UnicodeEncodeError):  # nothing a client could send
        return
    assert answer.status_code in (200, 400, 404), (body, answer.text)
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]


def test_the_description_of_the_server_holds(made: Server, web: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schemathesis = pytest.importorskip("schemathesis", reason="needs the package schemathesis")
        schema = schemathesis.openapi.from_asgi("/openapi.json", web.app)
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path == "/admin/drain":
            continue
        _calls(web, operation)
    assert made.service.open == 0


def _calls(web: Any, operation: Any) -> None:
    @settings(max_examples=12, phases=[Phase.generate], suppress_health_check=list(HealthCheck), deadline=None)
    @given(case=operation.as_strategy())
    def call(case: Any) -> None:
        answer = case.call(session=web)
        assert answer.status_code < 500, (operation.label, case.body, answer.text)

    call()
