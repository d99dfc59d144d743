from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.web import Server, backwards, client, events, server, tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("server"), {"first": 1.5, "team/second": 2.5}) as running:
        running.registry.point("first@live", {"first": 1.0, "team/second": 1.0})
        yield running


@pytest.fixture(scope="module")
def web(made: Server) -> Iterator[Any]:
    with client(made) as opened:
        yield opened


def test_a_completion_tells_text_usage_and_who_answered(made: Server, web: Any) -> None:
    answer = web.post("/v1/completions", json={"model": "first", "prompt": "Once upon a time"})
    told = answer.json()
    assert answer.status_code == 200
    assert told["choices"] == [
        {"index": 0, "text": backwards("Once upon a time"), "logprobs": None, "finish_reason": "stop"}
    ]
    count = len(tokenizer()("Once upon a time")["input_ids"])
    assert told["usage"] == {"prompt_tokens": count, "completion_tokens": count, "total_tokens": 2 * count}
    assert told["object"] == "text_completion"
    assert told["model"] == "first"
    assert answer.headers["x-lora-adapter"] == "first"
    assert answer.headers["x-lora-digest"] == made.registry.names.resolve("first").digest
    assert answer.headers["x-request-id"]


def test_the_base_answers_as_itself_alone(web: Any) -> None:
    answer = web.post("/v1/completions", json={"model": "tales", "prompt": "Hi"})
    assert (answer.headers["x-lora-adapter"], answer.headers["x-lora-digest"]) == ("tales", "none")


@pytest.mark.parametrize("model", ["third", "firs", "", "tales:third", "first@0123456789abcdef", "../first"])
def test_an_unknown_model_is_404_and_never_the_base(web: Any, model: str) -> None:
    answer = web.post("/v1/completions", json={"model": model, "prompt": "Hi"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert "x-lora-adapter" not in answer.headers


def test_half_of_a_surrogate_pair_is_no_text(web: Any) -> None:
    message = "holds half of a surrogate pair, which is no text"
    for body, param in (
        (b'{"model": "first", "prompt": "\\ud800"}', "prompt"),
        (b'{"model": "first", "prompt": ["a", "\\udc00"]}', "prompt"),
        (b'{"model": "first", "prompt": "a", "stop": "\\ud800"}', "stop"),
    ):
        answer = web.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == f"{param} {message}"
        assert answer.json()["error"]["param"] == param


def test_a_name_that_is_no_text_is_unknown_as_any_other(web: Any) -> None:
    body = b'{"model": "first", "prompt": "a", "\\ud800": 1}'
    answer = web.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unknown_parameter"), answer.text
    assert answer.json()["error"]["message"].startswith("\\ud800 is unknown")


def test_a_prompt_no_context_holds_is_refused_before_it_is_encoded(web: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "fox " * 100_000
    for path, body in (("completions", {"prompt": long}), ("chat/completions", {"messages": [said("user", long)]})):
        answer = web.post(f"/v1/{path}", json={"model": "first", **body})
        assert answer.status_code == 400
        assert "400,000 characters, more than a context of" in answer.json()["error"]["message"]


def test_a_body_of_another_kind_says_how_to_send_one(web: Any) -> None:
    answer = web.post("/v1/completions", content=b'{"model": "first", "prompt": "a"}')
    assert answer.status_code == 400
    assert "send one JSON object, with the header content-type: application/json" in answer.json()["error"]["message"]
    answer = web.put("/admin/adapters/x", json={})
    assert answer.json()["error"]["message"] == "path is missing"
    assert answer.json()["error"]["param"] == "path"


def test_no_more_biases_than_there_is_time_for(web: Any) -> None:
    body = {"model": "first", "prompt": "a", "logit_bias": {str(token): 1.0 for token in range(1025)}}
    answer = web.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "logit_bias"


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_prompts_come_as_texts_and_as_tokens(web: Any) -> None:
    ids = tokenizer()("a hen")["input_ids"]
    for prompt, texts in (
        (["a fox", "a hen"], ["a fox", "a hen"]),
        (ids, ["a hen"]),
        ([ids, ids], ["a hen", "a hen"]),
    ):
        told = web.post("/v1/completions", json={"model": "tales", "prompt": prompt}).json()
        assert [choice["text"] for choice in told["choices"]] == [backwards(text) for text in texts]
        assert [choice["index"] for choice in told["choices"]] == list(range(len(texts)))


def test_several_answers_have_seeds_of_their_own(made: Server, web: Any) -> None:
    before = len(made.engine.submitted)
    told = web.post("/v1/completions", json={"model": "first", "prompt": ["a", "b"], "n": 2, "seed": 7}).json()
    assert len(told["choices"]) == 4
    assert [request.sampling.seed for request in made.engine.submitted[before:]] == [7, 8, 7, 8]
    assert told["usage"]["prompt_tokens"] == 2


def test_every_option_reaches_the_engine(made: Server, web: Any) -> None:
    asked = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 3, "frequency_penalty": 0.25, "presence_penalty": -1,
             "logit_bias": {"5": -100}, "ignore_eos": True, "max_tokens": 3}  # fmt: skip
    web.post("/v1/completions", json={"model": "first", "prompt": "Hi", "lora_scale": 0.5, **asked})
    request = made.engine.submitted[-1]
    for name, value in asked.items():
        assert getattr(request.sampling, name) == ({5: -100.0} if name == "logit_bias" else value), name
    assert request.scale == 0.5


def test_openai_s_defaults_hold(made: Server, web: Any) -> None:
    web.post("/v1/completions", json={"model": "first", "prompt": "Hi"})
    assert (made.engine.submitted[-1].sampling.temperature, made.engine.submitted[-1].sampling.max_tokens) == (1.0, 16)
    web.post("/v1/chat/completions", json={"model": "first", "messages": [{"role": "user", "content": "Hi"}]})
    request = made.engine.submitted[-1]
    assert request.sampling.max_tokens == made.engine.limits.context - len(request.prompt)


def test_a_stop_string_ends_the_answer_and_the_engine_s_request(made: Server, web: Any) -> None:
    text = backwards("one two three four five six")
    stop = text[8:12]
    asked = {"model": "first", "prompt": "one two three four five six", "stop": stop, "ignore_eos": True}
    told = web.post("/v1/completions", json={**asked, "max_tokens": 4000}).json()
    assert told["choices"][0]["text"] == text[:8]
    assert told["choices"][0]["finish_reason"] == "stop"
    assert told["usage"]["completion_tokens"] < 10
    wait_idle(made)


def wait_idle(made: Server) -> None:
    import time

    until = time.monotonic() + 5
    while made.engine.stats().running and time.monotonic() < until:
        time.sleep(0.005)
    assert made.engine.stats().running == 0
    assert made.service.open == 0


def test_length_is_told_as_the_reason(web: Any) -> None:
    told = web.post("/v1/completions", json={"model": "first", "prompt": "one two three", "max_tokens": 1}).json()
    assert told["choices"][0]["finish_reason"] == "length"


def test_the_prompt_is_echoed_where_asked(web: Any) -> None:
    told = web.post("/v1/completions", json={"model": "first", "prompt": ["ab", "cd"], "echo": True}).json()
    assert [c["text"] for c in told["choices"]] == ["ab" + backwards("ab"), "cd" + backwards("cd")]
    streamed = web.post("/v1/completions", json={"model": "first", "prompt": "ab", "echo": True, "stream": True}).text
    assert "".join(e["choices"][0]["text"] for e in events(streamed)[:-1]) == "ab" + backwards("ab")


def test_completion_logprobs_have_one_row_a_token(web: Any) -> None:
    told = web.post("/v1/completions", json={"model": "first", "prompt": "a fox ran", "logprobs": 2}).json()
    found = told["choices"][0]["logprobs"]
    assert "".join(found["tokens"]) == told["choices"][0]["text"]
    assert found["token_logprobs"] == [0.0] * len(found["tokens"])
    assert [len(top) for top in found["top_logprobs"]] == [2] * len(found["tokens"])
    text = told["choices"][0]["text"]
    assert all(text.startswith(t, at) for t, at in zip(found["tokens"], found["text_offset"], strict=True))


def test_chat_logprobs_tell_the_bytes_of_a_token(web: Any) -> None:
    asked = {"model": "first", "messages": [{"role": "user", "content": "a fox"}], "logprobs": True, "top_logprobs": 1}
    told = web.post("/v1/chat/completions", json=asked).json()["choices"][0]
    content = told["logprobs"]["content"]
    assert b"".join(bytes(c["bytes"]) for c in content).decode() == told["message"]["content"]
    assert [len(c["top_logprobs"]) for c in content] == [1] * len(content)


def test_a_conversation_is_rendered_by_the_template(made: Server, web: Any) -> None:
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    told = web.post("/v1/chat/completions", json={"model": "first", "messages": turns}).json()
    assert tokenizer().decode(made.engine.submitted[-1].prompt) == "Be brief.\nUser: Hi\nAssistant:"
    assert told["choices"][0]["message"]["role"] == "assistant"
    assert told["object"] == "chat.completion"


def test_a_stream_is_the_same_answer_in_pieces(web: Any) -> None:
    asked = {"model": "first", "messages": [{"role": "user", "content": "a fox ran to a hen"}], "seed": 1}
    whole = web.post("/v1/chat/completions", json=asked).json()
    answer = web.post("/v1/chat/completions", json={**asked, "stream": True, "stream_options": {"include_usage": True}})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-lora-adapter"] == "first"
    *chunks, usage, done = events(answer.text)
    assert done == "[DONE]"
    assert usage["usage"] == whole["usage"]
    assert usage["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert "".join(d["content"] for d in deltas) == whole["choices"][0]["message"]["content"]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]


def test_a_stream_of_several_choices_tells_them_apart(web: Any) -> None:
    text = web.post("/v1/completions", json={"model": "first", "prompt": ["ab", "cd"], "stream": True}).text
    texts = {0: "", 1: ""}
    for chunk in events(text)[:-1]:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == {0: backwards("ab"), 1: backwards("cd")}


def test_lorax_s_adapter_id_chooses_on_openai_s_routes_too(web: Any) -> None:
    asked = {"model": "tales", "prompt": "Hi"}
    assert web.post("/v1/completions", json={**asked, "adapter_id": "first"}).headers["x-lora-adapter"] == "first"
    both = web.post("/v1/completions", json={"model": "first", "prompt": "Hi", "adapter_id": "team/second"})
    assert both.status_code == 400


def test_a_user_keeps_the_arm_of_an_alias(web: Any) -> None:
    arms = {
        user: {
            web.post("/v1/completions", json={"model": "first@live", "prompt": "Hi", "user": user}).headers[
                "x-lora-adapter"
            ]
            for _ in range(3)
        }
        for user in "abcdefgh"
    }
    assert {len(found) for found in arms.values()} == {1}
    assert set.union(*arms.values()) == {"first", "team/second"}


def test_models_are_listed_with_their_base_and_digest(made: Server, web: Any) -> None:
    listed = {one["id"]: one for one in web.get("/v1/models").json()["data"]}
    assert set(listed) == {"tales", "first", "team/second", "first@live"}
    assert listed["tales"]["parent"] is None
    assert listed["first"]["parent"] == "tales"
    digest = made.registry.names.resolve("first").digest
    assert listed["first"]["root"] == digest
    assert listed["first@live"]["arms"] == {"first": 1.0, "team/second": 1.0}
    assert web.get("/v1/models/team/second").json() == listed["team/second"]
    assert web.get(f"/v1/models/first@{digest[:12]}").json()["root"] == digest
    assert web.get("/v1/models/nobody").status_code == 404


@pytest.mark.parametrize(
    ("asked", "param", "said"),
    [
        ({"max_token": 5}, "max_token", "did you mean 'max_tokens'?"),
        ({"tools": [{"type": "function"}]}, "tools", "models here call no tools"),
        ({"response_format": {"type": "json_object"}}, "response_format", "answers are free text here"),
        ({"best_of": 3}, "best_of", "use n"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "5"}, "max_tokens", "valid integer"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4 texts"),
        ({"stop": [""]}, "stop", "1 to 256 characters"),
        ({"prompt": []}, "prompt", "expected a text"),
        ({"prompt": ["a", 1]}, "prompt", "expected a text"),
        ({"prompt": ""}, "prompt", "the prompt is empty"),
        ({"prompt": [5, 99999]}, "prompt", "token 99999 is not one of"),
        ({"logit_bias": {"five": 1}}, "logit_bias", "expected the id of a token"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "token 99999 is not one of"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "for streams alone"),
        ({"echo": True, "logprobs": 1}, "echo", "no logprobs of the prompt"),
        ({"lora_scale": 0.5, "model": "tales"}, "lora_scale", "the base without an adapter"),
        ({"n": 99}, "n", "less than or equal to 16"),
        ({"adapter_id": "second"}, "adapter_id", "name one adapter"),
    ],
)
def test_what_is_not_understood_is_refused_by_its_name(web: Any, asked: Any, param: str | None, said: str) -> None:
    answer = web.post("/v1/completions", json={"model": "first", "prompt": "Hi", **asked})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] == param
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("messages", "param", "said"),
    [
        ([], "messages", "at least 1 item"),
        ([{"role": "tool", "content": "x"}], "messages[0].role", "'system', 'developer', 'user' or 'assistant'"),
        ([{"role": "user"}], "messages[0].content", "is missing"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content", "read and write text alone"),
        ([{"role": "assistant", "content": "x", "tool_calls": [1]}], "messages[0].tool_calls", "no tools"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "messages",
            "nothing asks for an answer",
        ),
        ([{"role": "user", "content": "a", "nam": "b"}], "messages[0].nam", "did you mean 'name'?"),
    ],
)
def test_a_faulty_message_is_named_by_its_place(web: Any, messages: Any, param: str | None, said: str) -> None:
    answer = web.post("/v1/chat/completions", json={"model": "first", "messages": messages})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize("words", [3_000, 60_000])  # tokens beyond the context, characters beyond any tokens of it
def test_a_prompt_beyond_the_context_is_said_in_the_words_clients_look_for(web: Any, words: int) -> None:
    text = "a fox " * words
    for route, asked, param in (
        ("/v1/completions", {"model": "first", "prompt": text}, "prompt"),
        ("/v1/chat/completions", {"model": "first", "messages": [{"role": "user", "content": text}]}, "messages"),
        ("/generate", {"inputs": text}, "inputs"),
    ):
        answer = web.post(route, json=asked)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (400, param, "context_length_exceeded"), error


def test_parameters_that_ask_for_nothing_are_no_fault(web: Any) -> None:
    nothing = {"tools": [], "response_format": {"type": "text"}, "best_of": 1, "suffix": None, "store": False,
               "logit_bias": None, "seed": None, "stop": None, "service_tier": "auto"}  # fmt: skip
    assert web.post("/v1/completions", json={"model": "first", "prompt": "Hi", **nothing}).status_code == 200


def test_the_official_python_client_works_unchanged(made: Server, web: Any) -> None:
    openai = pytest.importorskip("openai", reason="needs the package openai")
    ask = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=web, max_retries=0)
    told = ask.chat.completions.create(model="first", messages=[{"role": "user", "content": "Hi"}], seed=1)
    text = told.choices[0].message.content
    chunks = ask.chat.completions.create(
        model="first", messages=[{"role": "user", "content": "Hi"}], stream=True, stream_options={"include_usage": True}
    )
    found = list(chunks)
    assert "".join(c.choices[0].delta.content or "" for c in found if c.choices) == text
    assert found[-1].usage.total_tokens == told.usage.total_tokens
    assert ask.completions.create(model="first", prompt="a fox", logprobs=1).choices[0].logprobs.tokens
    assert {model.id for model in ask.models.list()} >= {"tales", "first"}
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        ask.completions.create(model="nobody", prompt="a fox")
    with pytest.raises(openai.BadRequestError, match="tools is not supported") as refused:
        ask.chat.completions.create(model="first", messages=[{"role": "user", "content": "Hi"}], tools=[{"type": "x"}])
    assert refused.value.param == "tools"
    raw = ask.completions.with_raw_response.create(model="first", prompt="a fox")
    assert raw.headers["x-lora-adapter"] == "first"


def test_a_purpose_says_how_an_adapter_reads_one_message(tmp_path: Path) -> None:
    from dataclasses import replace

    from lorakit import save
    from lorakit.core.state import Purpose
    from tests.serving.adapters import tiny

    with server(tmp_path) as made, client(made) as web:
        asks = Purpose(format="prompt+completion", separator=" ->")
        save(replace(tiny(3.0), purpose=asks), made.folder / "asks")
        made.registry.add("asks", made.folder / "asks")
        one = [{"role": "user", "content": "Hi"}]
        assert web.post("/v1/chat/completions", json={"model": "asks", "messages": one}).status_code == 200
        assert tokenizer().decode(made.engine.submitted[-1].prompt) == "Hi ->"
        two = [{"role": "system", "content": "x"}, *one]
        refused = web.post("/v1/chat/completions", json={"model": "asks", "messages": two})
        assert refused.status_code == 400
        assert "reads one message of the user" in refused.json()["error"]["message"]
