from __future__ import annotations

import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import BusyError, RequestError
from lorakit.serving.prompts import Prompts, Reading
from lorakit.serving.templates import Templates
from tests.serving.adapters import folder_of
from tests.serving.web import client, server, tokenizer

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
RECURSIVE = "{% macro again(n) %}{% if n %}{{ again(n - 1) }}{{ again(n - 1) }}{% endif %}{% endmacro %}{{ again(99) }}"
TURNS = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("template", [ENDLESS, RECURSIVE, "{% generation %}" + ENDLESS + "{% endgeneration %}"])
def test_a_template_that_does_not_end_is_ended_and_names_its_model(template: str) -> None:
    prompts = Prompts(tokenizer(), 512)
    prompts.chat(TURNS, Reading(), "tales")  # whatever the first one imports
    began = time.thread_time()
    with pytest.raises(RequestError, match="the chat template of fables ran for more than 1 s"):
        prompts.chat(TURNS, Reading(template=template), "fables")
    assert 1 < time.thread_time() - began < 1.5
    assert prompts.chat(TURNS, Reading(), "tales")  # nothing is left of the limit


def test_whoever_traces_a_thread_still_does() -> None:
    def tracer(*_: Any) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        with Templates().rendering("{{ messages }}", "fables"):
            assert sys.gettrace() is not tracer
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


def test_what_a_template_writes_is_refused_before_it_is_encoded() -> None:
    with pytest.raises(
        RequestError, match="the rendered messages have 9,000,000 characters, more than a context of 64"
    ):
        Prompts(tokenizer(), 64).chat(TURNS, Reading(template="{{ 'a' * 9000000 }}"), "fables")


def test_a_template_has_one_conversation_at_a_time_and_others_go_on_meanwhile() -> None:
    templates, inside, leave = Templates(seconds=0.05), threading.Event(), threading.Event()

    def hold() -> None:
        with templates.rendering("slow", "fables"):
            inside.set()
            leave.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert inside.wait(20)
        with templates.rendering("other", "tales"):
            pass
        with (
            pytest.raises(BusyError, match="the chat template of fables is busy"),
            templates.rendering("slow", "fables"),
        ):
            pass
    finally:
        leave.set()
        thread.join()
    with templates.rendering("slow", "fables"):
        pass


def test_an_adapter_whose_template_does_not_end_keeps_nobody_waiting(tmp_path: Path) -> None:
    asked = {"messages": TURNS}
    with server(tmp_path) as made, client(made) as web:
        folder = folder_of(made.folder / "endless", 3.0)
        (folder / "chat_template.jinja").write_text(ENDLESS)
        made.registry.add("endless", folder)
        web.post("/v1/chat/completions", json={"model": "tales", **asked})  # whatever the first one imports
        held = threading.Thread(target=lambda: web.post("/v1/chat/completions", json={"model": "endless", **asked}))
        held.start()
        time.sleep(0.2)
        assert web.post("/v1/chat/completions", json={"model": "tales", **asked}).status_code == 200
        assert held.is_alive()
        held.join()
        answer = web.post("/v1/chat/completions", json={"model": "endless", **asked})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


def test_a_template_that_was_removed_and_added_anew_is_read_anew(tmp_path: Path) -> None:
    asked = {"model": "mine", "messages": TURNS}
    with server(tmp_path) as made, client(made) as web:
        folder = folder_of(made.folder / "mine", 3.0)
        for template in ("First: {{ messages[0].content }}", "Second: {{ messages[0].content }}"):
            (folder / "chat_template.jinja").write_text(template)
            made.registry.add("mine", folder)
            assert web.post("/v1/chat/completions", json=asked).status_code == 200
            said = tokenizer().decode(made.engine.submitted[-1].prompt)
            assert said == template.replace("{{ messages[0].content }}", "Hi")
            made.registry.remove("mine")
            while not made.registry.prune():  # its last answer may be about to let go of it
                time.sleep(0.01)


@pytest.mark.parametrize("text", ["x" * 2_000_000, "no\ud800"])
def test_what_a_template_raises_is_told_in_a_body_of_readable_length(text: str, tmp_path: Path) -> None:
    what = f"'{text[:1]}' * {len(text)}" if len(text) > 9 else repr(text)
    with server(tmp_path) as made, client(made) as web:
        folder = folder_of(made.folder / "raising", 3.0)
        (folder / "chat_template.jinja").write_text("{{ raise_exception(" + what + ") }}")
        made.registry.add("raising", folder)
        answer = web.post("/v1/chat/completions", json={"model": "raising", "messages": TURNS})
        assert answer.status_code == 400
        assert len(answer.content) < 5000
        assert text[:2].replace("xx", "x") in answer.json()["error"]["message"]


def test_another_template_under_the_same_name_replaces_it(tmp_path: Path) -> None:
    with server(tmp_path) as made, client(made) as web:
        folder = folder_of(made.folder / "mine", 3.0)
        for text in ("First", "Second"):
            (folder / "chat_template.jinja").write_text(text)
            made.registry.add("mine", folder, replace=True)
            assert web.post("/v1/chat/completions", json={"model": "mine", "messages": TURNS}).status_code == 200
            assert tokenizer().decode(made.engine.submitted[-1].prompt) == text
        made.registry.rollback("mine")
        web.post("/v1/chat/completions", json={"model": "mine", "messages": TURNS})
        assert tokenizer().decode(made.engine.submitted[-1].prompt) == "First"


def test_a_template_is_remembered_where_the_store_is_lost(tmp_path: Path) -> None:
    asked = {"model": "mine", "messages": TURNS}
    with server(tmp_path, {"other": 4.0}) as made, client(made) as web:
        made.registry.add("mine", folder_of(made.folder / "mine", 3.0))
        assert web.post("/v1/chat/completions", json=asked).status_code == 200
        shutil.rmtree(made.registry.store.root)
        assert web.post("/v1/chat/completions", json=asked).status_code == 200
        for lost in (
            web.post("/v1/chat/completions", json={**asked, "model": "other"}),
            web.post("/admin/prune"),
            web.put("/admin/adapters/two", json={"path": str(made.folder / "two")}),
        ):
            assert (lost.status_code, lost.json()["error"]["code"]) == (503, "store_unavailable"), lost.text


def test_a_name_in_a_file_that_is_no_text_refuses_the_adapter(tmp_path: Path) -> None:
    with server(tmp_path) as made, client(made) as web:
        folder = folder_of(made.folder / "odd", 3.0)
        (folder / "lorakit.json").unlink()
        config = folder / "adapter_config.json"
        config.write_text(config.read_text().replace("some/base", "\\ud800"))
        answer = web.put("/admin/adapters/odd", json={"path": str(folder)})
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "adapter_refused")
        assert "holds half of a surrogate pair" in answer.json()["error"]["message"]
