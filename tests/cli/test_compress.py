"""`lorakit compress`: a smaller adapter, what it lost, and the smallest that still scores."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from lorakit import AdapterSpec, LoRA, attach
from lorakit.combining import compress
from lorakit.combining.compress import STORED
from lorakit.core.method import Static
from lorakit.inject.attach import state
from lorakit.methods.block import BlockDiagonal
from lorakit.methods.dora import DoRA
from lorakit.methods.ia3 import IA3
from lorakit.persist import load, save
from lorakit.training.base import load_base
from tests.cli.conftest import answer, invoke
from tests.training import samples


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
    for words in (
        "14 updates of rank 1",
        "of all weights together",
        "the output of a layer moves by",
        f"wrote {tmp_path}",
    ):
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
        (["--size", "half"], "is no amount of bytes; write 50%"),
        (["--size", "1B"], "bytes hold nothing of it"),
        (["--rank", 2, "--data", "x.jsonl"], "give --within too"),
        (["--within", 0.1, "--rank", 2], "--rank and --within each say how much to keep"),
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


def dora_on(base: Path, place: Path, method: Static | None = None, form: Literal["peft", "native"] = "peft") -> Path:
    """Write an adapter whose change depends on the base's weights."""
    model = load_base(str(base))[0]
    handle = attach(model, AdapterSpec(method or DoRA(LoRA(2, 4.0))))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save(state(model), place, form)
    return place


def test_another_base_is_refused_by_its_weights_and_by_its_shapes(base: Path, tmp_path: Path) -> None:
    dora = dora_on(base, tmp_path / "dora")
    model = load_base(str(base))[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for place in ("other", "wide"):
        shutil.copytree(base, tmp_path / place)
    model.save_pretrained(tmp_path / "other")
    wide = LlamaConfig(**{**model.config.to_dict(), "intermediate_size": 64})
    AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path / "wide")
    together = ["combine", dora, dora, "--how", "svd", "--rank", 2]
    for verb in (["compress", dora, "--rank", 2], together, ["diff", dora, dora], ["inspect", dora]):
        out = ["--output", tmp_path / "none"] if verb[0] in ("compress", "combine") else []
        refused = invoke(*verb, "--base", tmp_path / "other", *out)
        assert refused.exit_code == 2, refused.stdout
        assert "was trained on another base" in refused.stderr
        refused = invoke(*verb, "--base", tmp_path / "wide", *out)
        assert refused.exit_code == 2, f"{verb}: {refused.exception!r}"
        assert "gate_proj" in refused.stderr
        assert "48" in refused.stderr, "what the adapter is for"
    assert not (tmp_path / "none").exists()


def test_an_adapter_gets_no_name_of_a_base_it_was_not_trained_on(run: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "other")
    model = load_base(str(base))[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    model.save_pretrained(tmp_path / "other")
    shutil.copytree(samples.save_encoder(tmp_path / "bert"), tmp_path / "encoder")
    for place, why in (
        ("other", f"another base ({base}) than this model ({tmp_path / 'other'})"),
        ("encoder", "none of"),
    ):
        for verb in (["compress", run, "--rank", 2], ["combine", run, run]):
            refused = invoke(*verb, "--base", tmp_path / place, "--output", tmp_path / "none")
            assert refused.exit_code == 2, refused.stdout
            assert why in refused.stderr
    assert not (tmp_path / "none").exists()
    shutil.copytree(base, tmp_path / "moved")
    answer("compress", run, "--rank", 2, "--base", tmp_path / "moved", "--output", tmp_path / "small")
    assert load(tmp_path / "small").base.name == str(tmp_path / "moved")


@pytest.mark.parametrize("dtype", ["bf16", "int8", "fp8"])
def test_what_is_kept_in_fewer_bits_stays_in_them(run: Path, tmp_path: Path, dtype: str) -> None:
    first = answer("compress", run, "--output", tmp_path / "first", "--rank", 4, "--dtype", dtype)
    again = answer("compress", tmp_path / "first", "--output", tmp_path / "again", "--size", "50%")
    assert again["bytes_before"] == first["bytes"]
    assert again["bytes"] <= first["bytes"] / 2
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("first", "again")]
    assert sizes[1] < sizes[0]
    stored = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {STORED[dtype]}


def test_a_lora_that_is_no_smaller_is_not_written(base: Path, tmp_path: Path) -> None:
    ia3 = dora_on(base, tmp_path / "ia3", IA3())
    block = dora_on(base, tmp_path / "block", BlockDiagonal(4, blocks=2), "native")
    for larger, asked in ((ia3, ["--energy", 0.99]), (block, ["--rank", 2])):
        refused = invoke("compress", larger, *asked, "--output", tmp_path / "x")
        assert refused.exit_code == 2
        assert "nothing was written: as a LoRA of that rank it would take" in refused.stderr
        assert not (tmp_path / "x").exists()
    assert "lorakit compress" not in invoke("inspect", ia3, "--base", base).stdout, "no advice that makes it larger"


def test_the_bound_that_is_said_holds_for_every_layer(run: Path, tmp_path: Path) -> None:
    said = invoke("compress", run, "--output", tmp_path / "a", "--rank", 1).stdout
    bounds = answer("compress", run, "--output", tmp_path / "b", "--rank", 1)["bounds"]
    assert f"moves by at most {max(bounds.values()):.3g} |x|" in said


def test_a_size_may_be_a_number_of_bytes(run: Path, tmp_path: Path) -> None:
    for i, size in enumerate(("3000", "3 kb", "0.003MB")):
        assert answer("compress", run, "--output", tmp_path / f"{i}", "--size", size)["bytes"] <= 3000


def test_a_file_of_loralib_is_to_be_converted_first(run: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.bin"
    torch.save({"layer.q.lora_A": torch.randn(2, 8), "layer.q.lora_B": torch.randn(8, 2)}, old)
    for asked in (["compress", old, "--rank", 1], ["combine", old, run]):
        said = invoke(*asked, "--output", tmp_path / "none").stderr
        assert f"lorakit convert {old} --to peft --alpha ALPHA" in said
    assert "--alpha ALPHA" in invoke("diff", run, old).stderr
