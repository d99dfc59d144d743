"""`lorakit serve` from the outside: a process that answers, what it refuses to start with, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lorakit.core.spec import AdapterSpec, Targets
from lorakit.inject.attach import adapters_named, attach, state
from lorakit.methods.lora import LoRA
from lorakit.persist import save
from lorakit.training.base import load_base
from lorakit.training.generate import generate
from tests.cli.conftest import invoke
from tests.law.cases import jitter


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two adapters of the bundled base."""
    folder = tmp_path_factory.mktemp("adapters")
    model, _ = load_base("lorakit/tales")
    for name in ("one", "two"):
        attach(model, AdapterSpec(LoRA(4), targets=Targets(("q_proj", "v_proj"))), name)
        for adapter in adapters_named(model, name):
            jitter(adapter)
        save(state(model, name), folder / name)
    return folder


HEEDING = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a parent in the background leaves ignored
runpy.run_module("lorakit", run_name="__main__", alter_sys=True)
"""


def start(*words: str) -> subprocess.Popen[str]:
    """Start a server that says in JSON when it listens."""
    return subprocess.Popen(
        [sys.executable, "-c", HEEDING, "serve", "lorakit/tales", "--port", "0", "--json", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def server(adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server with both adapters, and its address."""
    process = start("--adapters", str(adapters), "--store", str(tmp_path_factory.mktemp("store")))
    assert process.stdout is not None
    said = json.loads(process.stdout.readline())
    assert said["models"] == ["lorakit/tales", "tales", "one", "two"]
    yield process, said["url"]
    process.kill()
    process.wait()


def ask(url: str, model: str, **more: Any) -> dict[str, Any]:
    """Return the answer of a completion."""
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, **more}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.loads(answer.read())
    return found


def test_a_server_answers_with_the_base_and_with_each_adapter_as_generate_does(
    server: tuple[subprocess.Popen[str], str], adapters: Path
) -> None:
    from lorakit import load, use

    _, url = server
    model, tokenizer = load_base("lorakit/tales")
    prompt = [tokenizer("Once upon a time")["input_ids"]]
    for name in ("one", "two"):
        attach(model, load(adapters / name), name)
    for name, weights in (("lorakit/tales", {}), ("one", {"one": 1.0}), ("two", {"two": 1.0})):
        use(model, weights)
        (wanted,) = generate(model, tokenizer, prompt, max_new_tokens=8)
        assert ask(url, name)["choices"][0]["text"] == wanted


def test_an_unknown_adapter_is_404_and_never_the_base(server: tuple[subprocess.Popen[str], str]) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(server[1], "tree")
    assert refused.value.code == 404
    said = json.loads(refused.value.read())["error"]["message"]
    assert said == "'tree' is not served here; served are lorakit/tales, one, tales, two"


def test_ctrl_c_ends_the_server_in_one_line_without_a_traceback(server: tuple[subprocess.Popen[str], str]) -> None:
    process, _ = server
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.strip().endswith("interrupted")


def test_what_cannot_be_served_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    for words, why in (
        (("--host", "0.0.0.0"), "0.0.0.0 can be reached by others and no keys were given"),
        (("--memory", "much"), "--memory 'much' is no amount of bytes; write 800kB, 1.5MB or 4GB"),
        (("--adapters", str(tmp_path / "none")), "none is not a folder"),
        (("--adapters", str(tmp_path)), "holds no adapter"),
        (("--keys", str(tmp_path / "keys.json")), "keys.json cannot be read"),
        (("--new-key", "shop"), "name it: --keys keys.json"),
    ):
        result = invoke("serve", "lorakit/tales", "--store", str(tmp_path / "store"), *words)
        assert result.exit_code == 2, words
        assert why in " ".join(result.stderr.split()), result.stderr
        assert ("loading" in result.stderr) == (why == "holds no adapter")


def test_names_whose_files_are_gone_are_said_at_the_start(tmp_path: Path) -> None:
    digest = "0123456789abcdef" * 4
    turn = {"at": "2026-01-01T00:00:00+00:00", "target": digest}
    (tmp_path / "names.json").write_text(json.dumps({"version": 1, "pointers": {"fables": [turn]}}))
    process = start("--store", str(tmp_path))
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert f"the files of these are gone from {tmp_path}" in " ".join(told.split())
    assert "fables" in told


def test_without_a_base_it_says_how(tmp_path: Path) -> None:
    result = invoke("serve", "--keys", str(tmp_path / "keys.json"))
    assert result.exit_code == 2
    assert "name a base, or an adapter of one: lorakit serve lorakit/tales" in " ".join(result.stderr.split())


def test_a_port_that_is_taken_is_said_so(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = invoke("serve", "lorakit/tales", "--store", str(tmp_path), "--port", port)
    assert result.exit_code == 2
    assert f"cannot listen at 127.0.0.1:{port}" in result.stderr


def test_a_new_key_is_shown_once_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    result = invoke("serve", "lorakit/tales", "--new-key", "shop", "--scopes", "infer,admin", "--keys", str(file))
    assert result.exit_code == 0, result.stderr
    secret = result.stdout.strip()
    assert secret.startswith("lora-")
    assert secret not in file.read_text()
    again = invoke("serve", "--new-key", "shop", "--keys", str(file))
    assert "has a key 'shop' already" in again.stderr
    wrong = invoke("serve", "lorakit/tales", "--new-key", "b", "--scopes", "inferr", "--keys", str(file))
    assert wrong.exit_code == 2
    assert "did you mean 'infer'" in wrong.stderr


def test_a_second_ctrl_c_ends_what_runs_and_tells_its_clients(tmp_path: Path) -> None:
    process = start("--store", str(tmp_path))
    assert process.stdout is not None
    url = json.loads(process.stdout.readline())["url"]
    with ThreadPoolExecutor(1) as clients:
        asking = clients.submit(ask, url, "tales", max_tokens=480, ignore_eos=True, n=16)
        while not reading(f"{url}/ready")["open"]:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        with pytest.raises(OSError):  # refused, or reset while it stops listening
            while True:
                reading(f"{url}/ready")
        process.send_signal(signal.SIGINT)
        with pytest.raises(urllib.error.HTTPError) as refused:
            asking.result(60)
    assert refused.value.code == 503
    assert "the server stopped before the answer was finished" in refused.value.read().decode()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors


def reading(url: str) -> Any:
    """Return what a route answers."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        return json.loads(answer.read())
