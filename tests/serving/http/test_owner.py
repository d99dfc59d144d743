from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.web import Server, backwards, client, events, server, tokenizer

ASKED = {"model": "first", "prompt": "Hi"}


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Server]:
    with server(tmp_path, {"first": 1.5, "second": 2.5}) as running:
        yield running


@pytest.fixture
def web(made: Server) -> Iterator[Any]:
    with client(made) as opened:
        yield opened


def test_vllm_s_load_and_unload_have_its_texts_and_codes(made: Server, web: Any) -> None:
    load = {"lora_name": "a", "lora_path": str(made.folder / "one"), "load_inplace": False, "is_3d_lora_weight": False}
    done = web.post("/v1/load_lora_adapter", json=load)
    assert (done.status_code, done.text) == (200, "Success: LoRA adapter 'a' added successfully.")
    assert web.post("/v1/completions", json={"model": "a", "prompt": "Hi"}).headers["x-lora-adapter"] == "a"
    again = web.post("/v1/load_lora_adapter", json=load)
    assert (again.status_code, again.json()["error"]["type"]) == (400, "InvalidUserInput")
    assert "The lora adapter 'a' has already been loaded." in again.json()["error"]["message"]
    gone = web.post("/v1/load_lora_adapter", json={"lora_name": "b", "lora_path": str(made.folder / "none")})
    assert (gone.status_code, gone.json()["error"]["type"]) == (404, "NotFoundError")
    half = web.post("/v1/load_lora_adapter", json={"lora_name": "b"})
    assert (half.status_code, half.json()["error"]["type"]) == (400, "InvalidUserInput")
    off = web.post("/v1/unload_lora_adapter", json={"lora_name": "a", "lora_int_id": 1})
    assert (off.status_code, off.text) == (200, "Success: LoRA adapter 'a' removed successfully.")
    off = web.post("/v1/unload_lora_adapter", json={"lora_name": "a"})
    assert (off.status_code, off.json()["error"]["type"]) == (404, "NotFoundError")
    assert web.post("/v1/completions", json={"model": "a", "prompt": "Hi"}).status_code == 404


def test_a_reload_in_place_is_another_digest_under_the_same_name(made: Server, web: Any) -> None:
    before = web.post("/v1/completions", json=ASKED).headers["x-lora-digest"]
    load = {"lora_name": "first", "lora_path": str(made.folder / "two"), "load_inplace": True}
    assert web.post("/v1/load_lora_adapter", json=load).status_code == 200
    assert web.post("/v1/completions", json=ASKED).headers["x-lora-digest"] != before


def test_an_adapter_the_engine_refuses_is_422_with_what_it_said(made: Server, web: Any) -> None:
    from lorakit.errors import AdapterFileError

    digest = made.registry.store.add(made.folder / "one").digest
    said = "model.layers.0.self_attn.q_proj: expected (256, 256), got (4, 4)"
    made.engine.broken[digest] = AdapterFileError(said)
    for path, method, body in (
        ("/v1/load_lora_adapter", "POST", {"lora_name": "a", "lora_path": str(made.folder / "one")}),
        ("/admin/adapters/a", "PUT", {"path": str(made.folder / "one")}),
    ):
        refused = web.request(method, path, json=body)
        assert refused.status_code == 422
        assert said in refused.json()["error"]["message"]
    assert "a" not in made.registry.names.pointers()


def test_the_owner_adds_lists_and_removes_adapters(made: Server, web: Any) -> None:
    put = web.put("/admin/adapters/team/third", json={"path": str(made.folder / "one"), "pin": True})
    assert put.status_code == 200
    assert put.json()["digest"] == made.registry.names.resolve("team/third").digest
    listed = web.get("/admin/adapters").json()
    assert {one["id"] for one in listed["models"]} == {"tales", "first", "second", "team/third"}
    assert listed["usage"]["adapters"] >= 1
    other = web.put("/admin/adapters/team/third", json={"path": str(made.folder / "two")})
    assert other.status_code == 400
    assert web.delete("/admin/adapters/team/third").json() == {"removed": "team/third"}
    assert web.delete("/admin/adapters/team/third").status_code == 404


def test_a_pin_is_put_kept_and_taken_off(made: Server, web: Any) -> None:
    def put(**more: Any) -> bool:
        told = web.put("/admin/adapters/third", json={"path": str(made.folder / "one"), **more})
        return bool(told.json()["pinned"])

    assert [put(), put(pin=True), put(), put(pin=False), put()] == [False, True, True, False, False]


def test_pruning_deletes_what_nothing_can_be_turned_to_and_nothing_else(made: Server, web: Any) -> None:
    put = {"path": str(made.folder / "one")}
    digest = web.put("/admin/adapters/third", json=put).json()["digest"]
    web.put("/admin/adapters/third", json={"path": str(made.folder / "two"), "replace": True})
    assert web.post("/admin/prune").json() == {"removed": [], "bytes": 0}  # a rollback needs it
    web.delete("/admin/adapters/third")
    told = web.post("/admin/prune").json()
    assert digest in told["removed"]
    assert told["bytes"] > 0
    assert not (made.registry.store.root / "adapters" / digest).exists()
    assert web.post("/v1/completions", json=ASKED).status_code == 200
    assert web.put("/admin/adapters/third", json=put).json()["digest"] == digest


def test_the_page_of_routes_loads_nothing_and_names_every_route_and_field(web: Any) -> None:
    page, schema = web.get("/docs"), web.get("/openapi.json").json()
    assert page.status_code == 200
    assert not re.search(r"<script|<link|https?://|@import|url\(", page.text)
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for path, ways in schema["paths"].items():
        for method in ways:
            assert f"<b><code>{method.upper()}</code></b> <code>{path}</code>" in page.text
    told = re.sub("<[^>]+>", " ", page.text)
    for row in ("prompt   string or list of string or list of integer or list of list of integer, needed",
                "top_p   number above 0 to 1, 1.0 unless told", "parameters.max_new_tokens   integer from 1, 20 unless",
                "since   number from 0, in the query"):  # fmt: skip
        assert " ".join(row.split()) in " ".join(told.split())


def test_an_alias_is_turned_shared_out_rolled_back_and_forgotten(web: Any) -> None:
    alias = "/admin/aliases/first@live"
    assert web.put(alias, json={"target": "first"}).status_code == 200
    assert web.put(alias, json={"weights": {"first": 0.9, "second": 0.1}}).status_code == 200
    arms = {
        web.post("/v1/completions", json={**ASKED, "model": "first@live", "user": str(user)}).headers["x-lora-adapter"]
        for user in range(40)
    }
    assert arms == {"first", "second"}
    assert web.post(f"{alias}/rollback").json() == {"alias": "first@live", "target": "first"}
    assert web.post("/v1/completions", json={**ASKED, "model": "first@live"}).headers["x-lora-adapter"] == "first@live"
    assert web.delete(alias).status_code == 200
    assert web.post(f"{alias}/rollback").status_code == 404
    for body in ({}, {"target": "first", "weights": {"first": 1.0}}, {"target": "nobody"}, {"weights": {"first": -1}}):
        assert web.put(alias, json=body).status_code in (400, 404)


def test_a_rating_finds_the_adapter_that_answered(made: Server, web: Any) -> None:
    for path, body in (
        ("/v1/completions", ASKED),
        ("/v1/chat/completions", {"model": "first", "messages": [{"role": "user", "content": "Hi"}]}),
    ):
        told = web.post(path, json=body)
        rated = web.post("/v1/feedback", json={"response_id": told.json()["id"], "rating": 1, "comment": "good"})
        assert rated.status_code == 200, rated.text
    lorax = web.post("/generate", json={"inputs": "Hi", "parameters": {"adapter_id": "first"}})
    web.post("/v1/feedback", json={"response_id": lorax.headers["x-response-id"], "rating": -1.0})
    (row,) = web.get("/admin/feedback").json()["rows"]
    assert (row["name"], row["requests"], row["ratings"]) == ("first", 3, 3)
    assert row["rating"] == pytest.approx(1 / 3)
    assert web.get("/admin/feedback", params={"since": 1e12}).json()["rows"] == []
    assert web.post("/v1/feedback", json={"response_id": "nobody", "rating": 1}).status_code == 400
    assert web.post("/v1/feedback", json={"response_id": "nobody", "rating": 2}).status_code == 400


def test_an_answer_can_be_rated_the_moment_it_is_there(made: Server, web: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert made.service.feedback is not None
    real = made.service.feedback.answered
    monkeypatch.setattr(made.service.feedback, "answered", lambda told: time.sleep(0.2) or real(told))
    told = web.post("/v1/completions", json=ASKED).json()
    assert web.post("/v1/feedback", json={"response_id": told["id"], "rating": 1}).status_code == 200


def test_lorax_s_generate_tells_text_and_details(web: Any) -> None:
    asked = {"inputs": "a fox ran", "parameters": {"adapter_id": "first", "details": True, "do_sample": False}}
    told = web.post("/generate", json=asked)
    count = len(tokenizer()("a fox ran")["input_ids"])
    assert told.json()["generated_text"] == backwards("a fox ran")
    assert told.json()["details"]["finish_reason"] == "eos_token"
    assert told.json()["details"]["generated_tokens"] == count == len(told.json()["details"]["tokens"])
    assert told.headers["x-lora-adapter"] == "first"
    full = {"inputs": "ab", "parameters": {"return_full_text": True}}
    assert web.post("/generate", json=full).json() == {"generated_text": "ab" + backwards("ab")}


def test_lorax_s_stream_has_an_event_a_token_and_the_text_with_the_last(made: Server, web: Any) -> None:
    asked = {"inputs": "a fox ran", "parameters": {"adapter_id": "first", "max_new_tokens": 2}}
    found = events(web.post("/generate_stream", json=asked).text)
    text = tokenizer().decode(tokenizer()("a fox ran")["input_ids"][::-1][:2])
    assert [event["generated_text"] for event in found] == [None] * (len(found) - 1) + [text]
    assert found[-1]["details"]["finish_reason"] == "length"
    assert "".join(event["token"]["text"] for event in found[:2]) == text
    assert len(found) == 2


def test_lorax_s_stop_and_sampling_reach_the_engine(made: Server, web: Any) -> None:
    web.post("/generate", json={"inputs": "Hi", "parameters": {"max_new_tokens": 3}})
    assert made.engine.submitted[-1].sampling.temperature == 0.0
    web.post("/generate", json={"inputs": "Hi", "parameters": {"do_sample": True, "seed": 4, "top_k": 3}})
    sampling = made.engine.submitted[-1].sampling
    assert (sampling.temperature, sampling.seed, sampling.top_k) == (1.0, 4, 3)
    stop = {"inputs": "one two. three", "parameters": {"stop": ["."], "details": True}}
    assert web.post("/generate", json=stop).json()["details"]["finish_reason"] == "stop_sequence"


@pytest.mark.parametrize(
    ("parameters", "code"),
    [
        ({"adapter_id": "nobody"}, 404),
        ({"adapter_id": "/etc"}, 404),
        ({"adapter_source": "local"}, 400),
        ({"merged_adapters": {"ids": ["a"]}}, 400),
        ({"api_token": "x"}, 400),
        ({"max_new_token": 1}, 400),
        ({"adapter_source": None, "merged_adapters": None, "watermark": False, "best_of": 1, "typical_p": None}, 200),
    ],
)
def test_what_lorax_has_and_this_server_not_is_refused_by_name(web: Any, parameters: Any, code: int) -> None:
    answer = web.post("/generate", json={"inputs": "Hi", "parameters": parameters})
    assert answer.status_code == code
    if code == 400:
        assert answer.json()["error"]["param"] == f"parameters.{next(iter(parameters))}"


def test_health_and_readiness_tell_different_things(made: Server, web: Any) -> None:
    made.service.warm = False
    assert (web.get("/health").status_code, web.get("/ready").status_code) == (200, 503)
    assert web.get("/ready").json()["status"] == "starting"
    made.service.warm = True
    assert web.get("/ready").json() == {"status": "ready", "open": 0}
    web.post("/admin/drain")
    assert (web.get("/health").status_code, web.get("/ready").json()["status"]) == (200, "draining")


def test_metrics_count_by_adapter(web: Any) -> None:
    count = len(tokenizer()("a fox ran")["input_ids"])
    web.post("/v1/completions", json={"model": "first", "prompt": "a fox ran"})
    web.post("/v1/completions", json={"model": "first", "prompt": "a fox ran", "stream": True})
    web.post("/v1/completions", json={"model": "nobody", "prompt": "a fox ran"})
    lines = web.get("/metrics").text.splitlines()
    for line in (
        'lora_requests_total{adapter="first",code="200"} 2.0',
        'lora_requests_total{adapter="none",code="404"} 1.0',
        f'lora_tokens_total{{adapter="first",kind="prompt"}} {2 * count}.0',
        f'lora_tokens_total{{adapter="first",kind="completion"}} {2 * count}.0',
        'lora_ttft_seconds_count{adapter="first"} 2.0',
        'lora_slots{state="running"} 0.0',
        'lora_slots{state="free"} 8.0',
        'lora_adapter_loads_total{result="loaded"} 2.0',
        'lora_adapter_loads_total{result="failed"} 0.0',
    ):
        assert line in lines, "\n".join(lines)
    for name in ("lora_itl_seconds_count", "lora_queue_depth", "lora_adapter_cache_bytes", "lora_step_seconds_total"):
        assert any(line.startswith(name) for line in lines), name
    (info,) = [line for line in lines if line.startswith("vllm:lora_requests_info{")]
    assert 'max_lora="8"' in info
    assert 'running_lora_adapters=""' in info


def test_adapters_that_run_and_wait_are_named_in_vllm_s_gauge(tmp_path: Path) -> None:
    import threading

    with server(tmp_path, {"first": 1.5}, slots=1) as made, client(made) as web, made.engine.hold():
        asking = [threading.Thread(target=web.post, args=("/v1/completions",), kwargs={"json": ASKED}) for _ in "ab"]
        for one in asking:
            one.start()
        until = time.monotonic() + 5
        while made.engine.stats().waiting < 1 and time.monotonic() < until:
            time.sleep(0.01)
        text = web.get("/metrics").text
        assert 'running_lora_adapters="first",waiting_lora_adapters="first"' in text
        assert 'lora_queue_depth{adapter="first"} 1.0' in text
        for answer in list(made.service._open):
            made.engine.cancel(answer._choices[0].request.id)
        for one in asking:
            one.join(5)


def test_every_route_stands_on_its_page(web: Any) -> None:
    page = (Path(__file__).parents[3] / "docs" / "serving-http.md").read_text()
    for path in web.get("/openapi.json").json()["paths"]:
        name = path.replace("{name}", "fables").replace("{alias}", "fables@live").replace("{model}", "fables")
        assert re.search(re.escape(name) + "[ `?]", page), path


def test_names_beyond_the_first_are_counted_together() -> None:
    from lorakit.serving.metrics import Metrics

    metrics = Metrics(most_names=2)
    for name in ("a", "b", "c", "d", "a"):
        metrics.request(name, 200)
    text = metrics.text().decode()
    assert 'lora_requests_total{adapter="a",code="200"} 2.0' in text
    assert 'lora_requests_total{adapter="other",code="200"} 2.0' in text
    assert 'adapter="c"' not in text
