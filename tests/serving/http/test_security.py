from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorakit.serving.keys import Key, Keys
from tests.serving.adapters import folder_of
from tests.serving.web import Server, client, server

SECRETS = {
    "web": Key("web", frozenset(("infer",)), ("first*",), "shop"),
    "all": Key("all", frozenset(("infer",)), ("*",), "all"),
    "owner": Key("owner", frozenset(("admin",))),
    "eye": Key("eye", frozenset(("metrics",))),
}
ASKED = {"model": "first", "prompt": "Hi"}


def keys() -> Keys:
    import hashlib

    return Keys({hashlib.sha256(secret.encode()).hexdigest(): key for secret, key in SECRETS.items()})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("server"), {"first": 1.5, "second": 2.5}) as running:
        yield running


@pytest.fixture(scope="module")
def web(made: Server) -> Iterator[Any]:
    with client(made, keys(), body_bytes=2000) as opened:
        yield opened


def ask(web: Any, method: str, path: str, secret: str | None, json: Any = None) -> Any:
    headers = {"authorization": f"Bearer {secret}"} if secret else {}
    return web.request(method, path, json=json, headers=headers)


ROUTES = [
    ("POST", "/v1/completions", "web"),
    ("POST", "/v1/chat/completions", "web"),
    ("GET", "/v1/models", "web"),
    ("GET", "/v1/models/first", "web"),
    ("POST", "/generate", "web"),
    ("POST", "/generate_stream", "web"),
    ("POST", "/v1/feedback", "web"),
    ("POST", "/v1/load_lora_adapter", "owner"),
    ("POST", "/v1/unload_lora_adapter", "owner"),
    ("GET", "/admin/adapters", "owner"),
    ("PUT", "/admin/adapters/x", "owner"),
    ("DELETE", "/admin/adapters/x", "owner"),
    ("PUT", "/admin/aliases/x", "owner"),
    ("DELETE", "/admin/aliases/x", "owner"),
    ("POST", "/admin/aliases/x/rollback", "owner"),
    ("GET", "/admin/feedback", "owner"),
    ("POST", "/admin/drain", "owner"),
    ("POST", "/admin/prune", "owner"),
    ("GET", "/metrics", "eye"),
    ("GET", "/nothing/here", "web"),
]


@pytest.mark.parametrize(("method", "path", "right"), ROUTES)
def test_every_route_asks_for_a_key_with_its_scope(web: Any, method: str, path: str, right: str) -> None:
    for secret in (None, "guess"):
        refused = ask(web, method, path, secret)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "invalid_api_key"
    for other in {"web", "owner", "eye"} - {right}:
        assert ask(web, method, path, other).status_code == 403


def test_every_route_is_in_the_list_or_open(web: Any) -> None:
    described = {(m.upper(), path) for path, ways in web.get("/openapi.json").json()["paths"].items() for m in ways}
    listed = {(method, path) for method, path, _ in ROUTES}
    plain = {
        (method, path.replace("{name}", "x").replace("{alias}", "x").replace("{model}", "first"))
        for method, path in described
    }
    assert plain - listed == {("GET", "/health"), ("GET", "/ready")}


def test_a_refused_stranger_s_body_is_not_read(web: Any) -> None:
    assert web.post("/v1/completions", content=b"{" * 10).status_code == 401


@pytest.mark.parametrize("model", ["second", "tales", "tales:second", "second@live"])
def test_a_model_outside_the_allow_list_is_403_and_not_loaded(made: Server, web: Any, model: str) -> None:
    before = sum(made.engine.loads.values()), len(made.engine.submitted)
    for path, body in (
        ("/v1/completions", {"model": model, "prompt": "Hi"}),
        ("/v1/chat/completions", {"model": model, "messages": [{"role": "user", "content": "Hi"}]}),
        ("/generate", {"inputs": "Hi", "parameters": {"adapter_id": model}}),
        ("/v1/completions", {"model": "tales", "prompt": "Hi", "adapter_id": model}),
    ):
        assert ask(web, "POST", path, "web", body).status_code == 403
    assert ask(web, "GET", f"/v1/models/{model}", "web").status_code == 403
    assert (sum(made.engine.loads.values()), len(made.engine.submitted)) == before


def test_a_digest_is_no_way_around_the_allow_list(made: Server, web: Any) -> None:
    digest = made.registry.names.resolve("second").digest
    assert ask(web, "POST", "/v1/completions", "web", {"model": digest, "prompt": "Hi"}).status_code == 403
    assert ask(web, "POST", "/v1/completions", "web", {"model": f"first@{digest}", "prompt": "Hi"}).status_code == 404


def test_a_key_sees_the_models_it_may_ask(web: Any) -> None:
    assert [one["id"] for one in ask(web, "GET", "/v1/models", "web").json()["data"]] == ["first"]


@pytest.mark.parametrize("model", ["firstly", "first@01234567"])
def test_an_unknown_model_names_no_other_to_a_key_that_may_not_ask_all(web: Any, model: str) -> None:
    for answer in (
        ask(web, "POST", "/v1/completions", "web", {"model": model, "prompt": "Hi"}),
        ask(web, "GET", f"/v1/models/{model}", "web"),
    ):
        assert answer.status_code == 404
        assert answer.json()["error"]["message"] == (
            f"'{model}' is not served here; GET /v1/models lists what you may ask"
        )
    whole = ask(web, "POST", "/v1/completions", "all", {"model": model, "prompt": "Hi"})
    assert "first" in whole.json()["error"]["message"].replace(model, "")


def test_an_open_route_reads_no_body(web: Any) -> None:
    assert web.get("/health").status_code == 200
    assert web.request("GET", "/health", content=b"x").status_code == 413


def test_a_key_s_tenant_reaches_the_engine(made: Server, web: Any) -> None:
    assert ask(web, "POST", "/v1/completions", "web", ASKED).status_code == 200
    assert made.engine.submitted[-1].tenant == "shop"


@pytest.mark.parametrize(
    "path", ["/etc", "../../../etc", "adapters/../../..", "/proc/self", "\0", "/etc/passwd", "~", "file:///etc", ""]
)
def test_a_path_outside_the_roots_is_refused_and_nothing_told_of_it(made: Server, web: Any, path: str) -> None:
    loaded = ask(web, "POST", "/v1/load_lora_adapter", "owner", {"lora_name": "x", "lora_path": path})
    put = ask(web, "PUT", "/admin/adapters/x", "owner", {"path": path})
    assert (loaded.status_code, put.status_code) == (400, 400)
    assert "passwd" not in loaded.text.replace(path, "")
    assert "x" not in made.registry.names.pointers()


def test_a_link_out_of_the_roots_is_followed_and_refused(made: Server, web: Any, tmp_path: Path) -> None:
    folder_of(tmp_path / "outside", 9.0)
    (made.folder / "link").symlink_to(tmp_path / "outside")
    refused = ask(web, "POST", "/v1/load_lora_adapter", "owner", {"lora_name": "x", "lora_path": f"{made.folder}/link"})
    assert refused.status_code == 400


def test_a_pickle_is_never_opened(made: Server, web: Any) -> None:
    place = folder_of(made.folder / "pickled", 3.0)
    (place / "adapter_model.safetensors").unlink()
    (place / "adapter_model.bin").write_bytes(b"\x80\x04c__builtin__\nexit\n")
    refused = ask(web, "PUT", "/admin/adapters/x", "owner", {"path": str(place)})
    assert refused.status_code == 422
    assert "pickle" in refused.json()["error"]["message"]


def test_a_forged_manifest_is_refused(made: Server, web: Any) -> None:
    from lorakit.serving.shelf.arrival import describe

    place = folder_of(made.folder / "forged", 4.0)
    text = describe(place).text()
    (place / "manifest.json").write_text(text.replace(describe(place).digest, "0" * 64))
    refused = ask(web, "PUT", "/admin/adapters/x", "owner", {"path": str(place)})
    assert refused.status_code == 422
    assert "manifest.json says" in refused.json()["error"]["message"]


@pytest.mark.parametrize("name", ["../x", "x/../../y", ".hidden", "a b", "tales", "x" * 500, "0123456789abcdef"])
def test_a_name_that_could_be_a_path_or_a_digest_is_refused(made: Server, web: Any, name: str) -> None:
    body = {"lora_name": name, "lora_path": str(made.folder / "one")}
    assert ask(web, "POST", "/v1/load_lora_adapter", "owner", body).status_code == 400
    assert name not in made.registry.names.pointers()


def test_a_body_above_the_cap_is_413_whether_it_says_its_size_or_not(web: Any) -> None:
    headers = {"authorization": "Bearer web"}
    assert web.post("/v1/completions", content=b"x" * 2001, headers=headers).status_code == 413
    pieces = (b"x" * 500 for _ in range(10))
    assert web.post("/v1/completions", content=pieces, headers=headers).status_code == 413
    assert web.post("/v1/completions", content=b"x" * 2000, headers=headers).status_code == 400


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b"[" * 1900, b'{"model": 1e999}', b"1" * 1990, b'{"prompt":"\\ud800"}'],
)
def test_what_is_no_json_object_is_400(web: Any, body: bytes) -> None:
    headers = {"authorization": "Bearer web", "content-type": "application/json"}
    refused = web.post("/v1/completions", content=body, headers=headers)
    assert refused.status_code == 400
    assert set(refused.json()["error"]) == {"message", "type", "param", "code"}


def test_no_other_origin_is_answered(web: Any) -> None:
    headers = {"authorization": "Bearer web", "origin": "https://example.org"}
    assert not [h for h in web.get("/v1/models", headers=headers).headers if h.startswith("access-control")]


def test_a_request_id_is_taken_over_where_it_is_one(web: Any) -> None:
    assert web.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    odd = web.get("/health", headers={"x-request-id": "a b\x7f"}).headers["x-request-id"]
    assert odd.startswith("request-")


def test_what_nobody_expected_is_500_with_an_id_and_no_trace(
    made: Server, web: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(made.registry.names, "resolve", broken)
    failed = ask(web, "POST", "/v1/completions", "web", ASKED)
    assert failed.status_code == 500
    assert failed.headers["x-request-id"] in failed.json()["error"]["message"]
    assert "secret" not in failed.text
    assert "ZeroDivisionError" in caplog.text


def test_an_open_server_listens_to_its_own_machine_alone(made: Server) -> None:
    from lorakit.errors import ServingError
    from lorakit.serving.http import app, run

    for given in (None, Keys()):
        with pytest.raises(ServingError, match="listen at 127.0.0.1, or give keys"):
            run(app(made.service, given), host="0.0.0.0", keys=given)
