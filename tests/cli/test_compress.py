"""`lorakit compress`: a smaller adapter, what it lost, and the smallest that still scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorakit.combining import compress
from lorakit.persist import load
from tests.cli.conftest import answer, invoke


def test_a_budget_is_kept_and_its_error_is_the_library_s(run: Path, tmp_path: Path) -> None:
    said = answer("compress", run, "--output", tmp_path / "small", "--size", "50%")
    assert said["bytes"] <= said["bytes_before"] / 2
    made = compress(load(run / "adapter"), size=round(said["bytes_before"] / 2))
    assert said["error"] == pytest.approx(made.error)
    assert said["ranks"] == made.ranks
    assert load(tmp_path / "small").parameters * 4 == said["bytes"]
    scored = answer("evaluate", tmp_path / "small", "--data", run.parent / "valid.jsonl", "--no-compare")
    assert scored["after"]["loss"] > 0


def test_it_says_what_was_lost(run: Path, tmp_path: Path) -> None:
    said = invoke("compress", run, "--output", tmp_path / "small", "--rank", 1, "--dtype", "int8")
    assert said.exit_code == 0, said.stderr
    for words in ("14 updates of rank 1", "of all weights together", "an output moves by at most", f"wrote {tmp_path}"):
        assert words in said.stdout


def test_the_smallest_within_a_score_was_scored(run: Path, tmp_path: Path) -> None:
    said = answer("compress", run, "--output", tmp_path / "small", "--within", 0.05, "--dtype", "bf16")
    good = [one for one in said["tried"] if one["within"]]
    assert said["measure"] == "perplexity"
    assert said["bytes"] == min(one["bytes"] for one in good) < said["bytes_before"]
    assert all(one["score"] <= said["score"] * 1.05 for one in good)
    scored = answer("evaluate", tmp_path / "small", "--data", run.parent / "valid.jsonl", "--no-compare")
    chosen = min(good, key=lambda one: one["bytes"])
    assert scored["after"]["perplexity"] == pytest.approx(chosen["score"], rel=1e-4)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ([], "compress to what"),
        (["--rank", 2, "--energy", 0.9], "give one of them"),
        (["--size", "half"], "is no size"),
        (["--size", "1B"], "bytes hold nothing of it"),
        (["--rank", 2, "--data", "x.jsonl"], "give --within too"),
        (["--within", 0.1, "--rank", 2], "--within finds the size by itself"),
        (["--within", 2], "above 0 and below 1"),
    ],
)
def test_what_cannot_be_asked_is_refused(run: Path, tmp_path: Path, asked: list[object], said: str) -> None:
    refused = invoke("compress", run, "--output", tmp_path / "small", *asked)
    assert refused.exit_code == 2, refused.stdout
    assert said in refused.stderr
    assert not (tmp_path / "small").exists()


def test_a_base_and_a_full_folder_are_refused(run: Path, base: Path, tmp_path: Path) -> None:
    assert "is a base without an adapter" in invoke("compress", base, "--output", tmp_path / "a", "--rank", 1).stderr
    assert "is not empty" in invoke("compress", run, "--output", run, "--rank", 1).stderr


def test_an_adapter_that_names_no_base_needs_none(tmp_path: Path) -> None:
    torch.save({"layer.q.lora_A": torch.randn(2, 8), "layer.q.lora_B": torch.randn(8, 2)}, tmp_path / "old.bin")
    answer("convert", tmp_path / "old.bin", "--alpha", 4, "--to", "peft", "--output", tmp_path / "peft")
    assert answer("compress", tmp_path / "peft", "--output", tmp_path / "one", "--rank", 1)["ranks"] == {"layer.q": 1}
    both = answer("combine", tmp_path / "peft", tmp_path / "one", "--output", tmp_path / "two")
    assert both["error"] < 1e-6
    refused = invoke("compress", tmp_path / "peft", "--output", tmp_path / "no", "--within", 0.1, "--data", "x.jsonl")
    assert "does not say which base" in refused.stderr
