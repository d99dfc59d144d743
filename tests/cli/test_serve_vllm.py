"""`lorakit serve --engine vllm`: the same API and names in front, a vLLM server behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakit.training.base import load_tokenizer
from tests.cli.conftest import invoke
from tests.cli.test_serve import adapters, ask, start
from tests.serving.fake_vllm import FakeVLLM, written

__all__ = ["adapters"]  # the fixture


@pytest.mark.slow
def test_answers_come_from_vllm_by_name_and_its_store_keeps_the_files(adapters: Path, tmp_path: Path) -> None:
    with FakeVLLM(context=256).running() as fake:
        process = start("--adapters", str(adapters), "--store", str(tmp_path), "--engine", "vllm",
                        "--engine-url", fake.url)  # fmt: skip
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        try:
            assert said["models"] == ["lorakit/tales", "tales", "one", "two"]
            tokenizer = load_tokenizer("lorakit/tales")
            prompt = tokenizer("Once upon a time")["input_ids"]
            for name in ("one", "two"):
                wanted = tokenizer.decode(written(adapters / name, prompt, 8))
                assert ask(said["url"], name)["choices"][0]["text"] == wanted
            assert all(Path(root).parent == tmp_path / "adapters" for root in fake.adapters.values())
            assert set(fake.adapters) == {Path(root).name for root in fake.adapters.values()}
        finally:
            process.kill()
            process.communicate()


def test_an_engine_and_its_address_go_together(tmp_path: Path) -> None:
    for words, why in (
        (("--engine", "vllm"), "--engine vllm and --engine-url URL go together"),
        (("--engine-url", "http://127.0.0.1:1"), "--engine vllm and --engine-url URL go together"),
        (("--replicas", "2"), "--replicas are Ray's; add --engine ray"),
        (("--engine", "vllm", "--engine-url", "http://127.0.0.1:1"), "vLLM at http://127.0.0.1:1 does not answer"),
    ):
        result = invoke("serve", "lorakit/tales", "--store", str(tmp_path), *words)
        assert result.exit_code == 2, words
        assert why in " ".join(result.stderr.split()), result.stderr
