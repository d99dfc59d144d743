"""A manifest says the same after it was written and read, and a wrong one is told by its key."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.core.state import Base, Purpose
from lorakit.errors import AdapterFileError
from lorakit.serving.shelf.manifest import File, Golden, Manifest, digest_of, read_manifest

SUM = "ab" * 32
FULL = Manifest(
    digest=SUM,
    files={"adapter_model.safetensors": File(SUM, 12)},
    base=Base("some/base", {"h.0": (0.5, -1.0)}),
    method="lora",
    rank=8,
    parameters=64,
    created="2026-01-02T03:04:05+00:00",
    base_config=SUM,
    base_tokenizer=SUM,
    purpose=Purpose("classification", "classification", "", ("no", "yes")),
    chat_template="{{ messages }}",
    evaluation={"loss": 1.5},
    golden=(Golden((1, 2), (3,)),),
    licence="apache-2.0",
)
BARE = replace(
    FULL, rank=None, base_config=None, base_tokenizer=None, purpose=None, chat_template=None, evaluation={}, golden=(),
    licence=None, base=Base(),
)  # fmt: skip
tokens = st.lists(st.integers(0, 2**31), min_size=1, max_size=5).map(tuple)
golden = st.builds(Golden, tokens, tokens)


@given(
    scores=st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False, allow_infinity=False), max_size=3),
    prompts=st.lists(golden, max_size=8).map(tuple),
    bare=st.booleans(),
)
def test_what_was_written_is_read(scores: dict[str, float], prompts: tuple[Golden, ...], bare: bool) -> None:
    manifest = replace(BARE if bare else FULL, evaluation=scores, golden=prompts)
    assert Manifest.from_json(json.loads(manifest.text())) == manifest


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("method", 3, "method: expected text, found 3"),
        ("rank", True, "rank: expected a whole number of at least 0, found True"),
        ("rank", -1, "rank: expected a whole number"),
        ("digest", "xyz", "digest: expected a sha256 of 64 hexadecimal digits, found 'xyz'"),
        ("files", {"a": {"sha256": SUM, "bytes": "12"}}, r"files\.a\.bytes: expected a whole number"),
        ("files", {"a": {"sha256": SUM}}, r"files\.a\.bytes: missing"),
        ("base", {"name": "b", "probes": {}, "config": None, "tokenizer": None, "x": 1}, r"base\.x: unknown key"),
        ("base", [], "base: expected an object"),
        ("evaluation", {"loss": float("nan")}, r"evaluation\.loss: expected a number, found nan"),
        ("golden", [{"prompt": [1, "b"], "tokens": [1]}], r"golden\[0\]\.prompt\[1\]: expected a whole number"),
        ("golden", [{"prompt": [], "tokens": [1]}], r"golden\[0\]: needs a prompt and the tokens that follow"),
        ("golden", [{"prompt": [1], "tokens": [1]}] * 9, "golden: 9 prompts"),
        ("purpose", {"task": "causal-lm"}, r"purpose\.format: missing"),
        ("licens", "mit", r"licens: unknown key; did you mean 'licence'\?"),
        ("version", 2, "version: expected 1, which this lorakit reads, found 2"),
    ],
)
def test_a_wrong_value_is_named_by_its_key(key: str, value: Any, message: str) -> None:
    with pytest.raises(AdapterFileError, match=f"^{message}"):
        Manifest.from_json({**FULL.to_json(), key: value})


def test_a_file_that_is_no_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"version": 1}')
    with pytest.raises(AdapterFileError, match=r"manifest\.json: digest: missing"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(AdapterFileError, match=r"manifest\.json is truncated or not JSON"):
        read_manifest(tmp_path)


def test_the_digest_is_what_sha256sum_prints() -> None:
    # printf '%s  a\n%s  b\n' $(printf '1%.0s' {1..64}) $(printf '2%.0s' {1..64}) | sha256sum
    known = "7365ea48c8a3989cf164ca67f5d934c9a11269a628308b0fe529b6e4bc1c694d"
    assert digest_of({"b": "2" * 64, "a": "1" * 64}) == known
