"""VLLMEngine against a real vLLM: its tokens are SlotEngine's. `LORAKIT_VLLM_PYTHON` names a Python that has vLLM."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorakit.core.spec import AdapterSpec, Targets
from lorakit.inject.sites import sites
from lorakit.methods.lora import LoRA
from lorakit.persist import save
from lorakit.serving.batching.engine import SlotEngine
from lorakit.serving.remote.vllm import VLLMEngine
from lorakit.serving.requests import Engine, Request, Sampling
from lorakit.serving.shelf.names import Names
from lorakit.serving.shelf.registry import Registry
from lorakit.serving.shelf.store import Store
from lorakit.training.base import resolve
from tests.serving.answers import ask
from tests.serving.models import adapter

PYTHON = os.environ.get("LORAKIT_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(PYTHON is None, reason="LORAKIT_VLLM_PYTHON names no Python that has vLLM"),
]
VOCABULARY = 4096
TARGETS = {"a": ("q_proj", "v_proj"), "b": "all-linear", "c": ("down_proj",), "d": ("o_proj", "gate_proj")}
RANKS = {"a": 2, "b": 8, "c": 4, "d": 16}


class Server:
    """A vLLM process on a port of its own, which can be stopped and started again."""

    def __init__(self, base: Path, log: Path) -> None:
        self.base, self.log = base, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = ["-m", "vllm.entrypoints.openai.api_server", "--model", self.base, "--dtype", "float32", "--port",
                 self.port, "--max-model-len", 128, "--enforce-eager", "--enable-lora", "--max-loras", 4,
                 "--max-lora-rank", 16, "--max-cpu-loras", 8]  # fmt: skip
        assert PYTHON is not None
        told = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "0-1", "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([PYTHON, *map(str, words)], stdout=log, stderr=log,
                                            env={**os.environ, **told}, start_new_session=True)  # fmt: skip
        end = time.monotonic() + 240
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            with suppress(OSError):
                urllib.request.urlopen(f"{self.url}/health", timeout=2)
                return
            time.sleep(0.5)
        pytest.fail(f"vLLM did not start:\n{self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(30)
            self.process = None


@pytest.fixture(scope="module")
def model() -> Any:
    """A random Llama whose tokens lie far enough apart."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, head_dim=64, vocab_size=VOCABULARY, bos_token_id=0,
                         eos_token_id=0, pad_token_id=1, max_position_embeddings=128)  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p.mul_(3.0)
    return made


@pytest.fixture(scope="module")
def folders(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of several ranks and targets, and the base with a tokenizer under `base`."""
    root = tmp_path_factory.mktemp("files")
    for name, targets in TARGETS.items():
        spec = AdapterSpec(LoRA(RANKS[name], 2.0 * RANKS[name]), Targets(targets))
        save(adapter(model, spec), root / name)
    model.save_pretrained(root / "base")
    for file in Path(resolve("lorakit/tales")).glob("tokenizer*"):
        shutil.copy(file, root / "base")
    return {name: root / name for name in (*TARGETS, "base")}


@pytest.fixture(scope="module")
def server(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(folders["base"], tmp_path_factory.mktemp("log") / "vllm.txt")
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture
def registries(
    model: Any, folders: dict[str, Path], server: Server, tmp_path: Path
) -> Iterator[tuple[Registry, Registry]]:
    """The same adapters behind vLLM and behind our own engine."""
    theirs = VLLMEngine(server.url, skeleton=sites(model), vocabulary=VOCABULARY, stops=[0], slots=8)
    ours = SlotEngine(model, stops=[0], slots=4, context=128)
    root = folders["base"].parent
    made = [
        Registry(engine, Store(tmp_path / name), Names(tmp_path / f"{name}.json", ("base",)), memory=1 << 30,
                 roots=[root])
        for name, engine in (("theirs", theirs), ("ours", ours))
    ]  # fmt: skip
    for registry in made:
        for name in TARGETS:
            registry.add(name, folders[name])
            registry.pin(name)
    yield made[0], made[1]
    theirs.close()
    ours.close()


def written(registry: Registry, names: list[str | None], **sampling: Any) -> list[list[int]]:
    """Return what each of these answers at once to a prompt of its own, greedily."""
    engine: Engine = registry.engine
    settings = Sampling(**{"max_tokens": 24, "ignore_eos": True, **sampling})
    digests = {name: next(iter(registry.names.digests(name))) for name in names if name is not None}
    requests = [
        Request(tuple((7 * i + 11 * k + 3) % VOCABULARY for k in range(4 + 3 * i)), name and digests[name],
                sampling=settings)
        for i, name in enumerate(names)
    ]  # fmt: skip
    answers = ask(engine, requests)
    assert {answer.end.reason for answer in answers} == {"length"}, [answer.end for answer in answers]
    return [answer.tokens for answer in answers]


def test_tokens_are_those_of_our_engine_mixed_reloaded_and_after_a_restart(
    registries: tuple[Registry, Registry], server: Server, folders: dict[str, Path]
) -> None:
    theirs, ours = registries
    names: list[str | None] = ["a", "b", "c", "d", "a", "b", "c", "d"]
    expected = written(ours, names)
    assert written(theirs, names) == expected
    assert len({tuple(tokens[:8]) for tokens in expected}) == len(names)

    # The base by itself: beside adapters, vLLM's CPU build lets the one in its last slot act on it
    # (github.com/vllm-project/vllm/pull/48421).
    assert written(theirs, [None, None]) == written(ours, [None, None])

    # another adapter under the same name, asked the same prompts: no cache answers for the old one
    for registry in registries:
        registry.add("a", folders["c"], replace=True)
    again = written(ours, names)
    assert written(theirs, names) == again
    assert again[0] != expected[0]

    server.stop()
    server.start()
    assert written(theirs, names) == again
    engine = theirs.engine
    assert isinstance(engine, VLLMEngine)
    assert engine.reconcile() == []


def test_an_end_of_sequence_and_log_probabilities_are_told_as_ours_are(registries: tuple[Registry, Registry]) -> None:
    found = []
    for registry in registries:
        biased = Sampling(max_tokens=8, logit_bias={0: 100.0}, logprobs=3)
        plain = Sampling(max_tokens=4, logprobs=3, ignore_eos=True)
        found.append(ask(registry.engine, [Request((5, 6, 7), sampling=s) for s in (biased, plain)]))
    for theirs, ours in zip(*found, strict=True):
        assert (theirs.tokens, theirs.end) == (ours.tokens, ours.end)
    assert found[0][0].tokens == []
    assert found[0][0].end.reason == "stop"
    for left, right in zip(found[0][1].events[:-1], found[1][1].events[:-1], strict=True):
        assert left.logprob == pytest.approx(right.logprob, abs=1e-3)  # type: ignore[union-attr]
        assert [token for token, _ in left.top] == [token for token, _ in right.top]  # type: ignore[union-attr]
