"""A server under thousands of mixed requests, killed and started again: no wrong token, nothing lost."""

from __future__ import annotations

import http.client
import json
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from lorakit import AdapterSpec, LoRA, Targets, attach, detach, load, save, state, use
from lorakit.inject.attach import adapters_named
from lorakit.training.base import load_base
from lorakit.training.generate import generate
from tests.law.cases import jitter

PROMPTS = ("Once upon a time", "The king", "A fox and a crow", "There was a", "She said: 'I", "In the wood")
VERSIONS = ("one", "two", "three", "four", "five")
NEW, REQUESTS, THREADS = 6, 10_000, 16
BASE = "lorakit/tales"


class Server:
    """A `lorakit serve` process."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lorakit", "serve", BASE, "--port", "0", "--json", *words],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self.process.stdout is not None
        self.said = json.loads(self.process.stdout.readline())
        self.place = urlsplit(self.said["url"]).netloc

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, str], Any]:
        """Return the code, the headers and the body of an answer."""
        link = http.client.HTTPConnection(self.place, timeout=120)
        try:
            link.request(method, path, None if body is None else json.dumps(body), {"content-type": "application/json"})
            answer = link.getresponse()
            text = answer.read()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, json.loads(text) if text else None
        finally:
            link.close()

    def leave(self, body: Any) -> None:
        """Ask for a stream and go away after its first bytes."""
        link = http.client.HTTPConnection(self.place, timeout=120)
        link.request("POST", "/v1/completions", json.dumps({**body, "stream": True, "max_tokens": 200}),
                     {"content-type": "application/json"})  # fmt: skip
        link.getresponse().read(10)
        link.close()

    def resident(self) -> int:
        """Return the bytes the process holds."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def made(root: Path, names: tuple[str, ...], rank: int = 4) -> dict[str, Path]:
    """Write adapters of the bundled base."""
    model, _ = load_base(BASE)
    for name in names:
        attach(model, AdapterSpec(LoRA(rank), targets=Targets(("q_proj", "v_proj", "down_proj"))), "made")
        for adapter in adapters_named(model, "made"):
            jitter(adapter)
        save(state(model, "made"), root / name)
        detach(model, "made")
    return {name: root / name for name in names}


def alone(folders: dict[str, Path]) -> dict[tuple[str, str], str]:
    """Return what each adapter writes after each prompt by itself, and the base, by `(adapter or "", prompt)`."""
    model, tokenizer = load_base(BASE)
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    for name, folder in folders.items():
        attach(model, load(folder), name)
    found = {}
    for name in ("", *folders):
        use(model, {name: 1.0} if name else {})
        texts = generate(model, tokenizer, ids, max_new_tokens=NEW, batch_size=1)
        found.update({(name, prompt): text for prompt, text in zip(PROMPTS, texts, strict=True)})
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_request_of_ten_thousand_gets_another_adapters_tokens_and_a_kill_loses_nothing(tmp_path: Path) -> None:
    folders = made(tmp_path / "adapters", VERSIONS)
    wanted = alone(folders)
    words = ("--adapters", str(tmp_path / "adapters"), "--store", str(tmp_path / "store"), "--queue", "1000")
    server = Server(*words)
    roots = {m["id"]: m["root"] for m in server.ask("GET", "/v1/models")[2]["data"]}
    by_digest = {roots[name]: name for name in VERSIONS}
    server.ask("PUT", "/admin/aliases/one@live", {"target": "one"})
    server.ask("PUT", "/admin/aliases/one@test", {"weights": {"two": 0.5, "three": 0.5}})
    wrong: list[str] = []
    codes: Counter[int] = Counter()

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(REQUESTS // THREADS):
            prompt, drawn = rng.choice(PROMPTS), rng.random()
            body = {"prompt": prompt, "max_tokens": NEW, "temperature": 0}
            if drawn < 0.02:
                server.leave({"model": rng.choice(VERSIONS), **body})
            elif drawn < 0.04:  # turn a pointer while others ask for it
                server.ask("PUT", "/admin/aliases/one@live", {"target": rng.choice(VERSIONS)})
            elif drawn < 0.05:
                codes[server.ask("POST", "/v1/completions", {"model": "nobody", **body})[0]] += 1
            else:
                model = rng.choice((*VERSIONS, "one@live", "one@test", BASE))
                code, headers, answer = server.ask("POST", "/v1/completions", {"model": model, **body})
                codes[code] += 1
                digest = headers.get("x-lora-digest", "")
                name = "" if digest == "none" else by_digest[digest]
                if model in VERSIONS and name != model:
                    wrong.append(f"{model} was answered by {name}")
                if code != 200 or answer["choices"][0]["text"] != wanted[name, prompt]:
                    wrong.append(f"{code} {name} {prompt!r}: {answer}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong[:5]
    assert set(codes) == {200, 404}
    live = {m["id"]: m["root"] for m in server.ask("GET", "/v1/models")[2]["data"]}["one@live"]
    server.kill()
    again = Server("--store", str(tmp_path / "store"))
    models = {m["id"]: m["root"] for m in again.ask("GET", "/v1/models")[2]["data"]}
    assert models["one@live"] == live
    for name in VERSIONS:
        code, _, answer = again.ask("POST", "/v1/completions", {"model": name, "prompt": PROMPTS[0], "max_tokens": NEW,
                                                                "temperature": 0})  # fmt: skip
        assert code == 200
        assert answer["choices"][0]["text"] == wanted[name, PROMPTS[0]]
    again.kill()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_five_hundred_adapters_are_served_from_the_memory_of_a_few(tmp_path: Path) -> None:
    names = tuple(f"a{number}" for number in range(500))
    folders = made(tmp_path / "adapters", names, rank=16)
    size = sum(file.stat().st_size for file in folders["a0"].iterdir())
    server = Server("--adapters", str(tmp_path / "adapters"), "--store", str(tmp_path / "store"),
                    "--memory", str(20 * size))  # fmt: skip
    before, rng = server.resident(), random.Random(0)
    for _ in range(400):
        body = {"model": rng.choice(names), "prompt": "A", "max_tokens": 1, "temperature": 0}
        assert server.ask("POST", "/v1/completions", body)[0] == 200
    usage = server.ask("GET", "/admin/adapters")[2]["usage"]
    assert usage["bytes"] <= 20 * size
    assert usage["evictions"] > 300
    assert server.resident() - before < 100 * size
    server.kill()
