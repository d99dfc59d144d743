"""`lorakit merge`: what is written answers as the adapted model did, or nothing is written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from lorakit.cli.merge import TOLERANCES
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.inject.attach import adapters_named, attach, state
from lorakit.inject.merge import MergeReport
from lorakit.inject.merge import merge as fold
from lorakit.methods.ia3 import IA3
from lorakit.methods.lora import LoRA
from lorakit.persist import load, save
from tests.cli.conftest import answer, invoke, write_recipe
from tests.tolerances import assert_close


def test_the_written_model_answers_as_the_adapted_one(run: Path, base: Path, tmp_path: Path) -> None:
    said = answer("merge", run, "--output", tmp_path / "merged")
    assert said["dtype"] == "float32"
    assert said["layers"] == 14
    assert said["max_abs_diff"] <= TOLERANCES["float32"] * said["largest_logit"]
    assert said["changed_from_base"] > 100 * said["max_abs_diff"]
    adapted = AutoModelForCausalLM.from_pretrained(base).eval()
    attach(adapted, load(run / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.tensor([[107, 42, 109, 108]])
    with torch.no_grad():
        assert_close(merged(ids).logits, adapted(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("ab")["input_ids"] == [266]
    GenerationConfig.from_pretrained(tmp_path / "merged")


@pytest.mark.parametrize(("dtype", "kept"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_a_narrow_dtype_is_written_with_its_rounding_said(run: Path, tmp_path: Path, dtype: str, kept: str) -> None:
    said = answer("merge", run, "--output", tmp_path / "merged", "--dtype", dtype)
    assert said["dtype"] == kept
    assert 0 < said["max_abs_diff"] <= TOLERANCES[kept] * said["largest_logit"]
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == kept


def test_a_16_bit_merge_says_that_its_difference_is_rounding_and_what_is_closer(run: Path, tmp_path: Path) -> None:
    said = invoke("merge", run, "--output", tmp_path / "narrow", "--dtype", "bf16").stdout
    assert re.search(
        r"^that is within the rounding of bf16 \(up to [\d.e-]+ for logits up to [\d.]+\); --dtype fp32 is closer, and "
        r"twice the size; rounding took [\d.]+% of the update \(Frobenius\)$", said, re.MULTILINE
    ), said  # fmt: skip
    assert "rounding" not in invoke("merge", run, "--output", tmp_path / "wide").stdout


def test_a_merge_that_changes_the_answers_writes_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lying(model: LlamaForCausalLM, **options: bool) -> MergeReport:
        report = fold(model, **options)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        return report

    monkeypatch.setattr("lorakit.inject.merge.merge", lying)
    result = invoke("merge", run, "--output", tmp_path / "merged")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: nothing was written: the merged model's logits differ")
    assert not (tmp_path / "merged").exists()


def test_a_merge_replaces_a_merged_model_but_nothing_else(base: Path, run: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert invoke("merge", run, "--output", tmp_path / "merged").exit_code == 0
        (tmp_path / "merged" / "model-00001-of-00002.safetensors").write_text("a stale shard")
    assert invoke("merge", run, "--output", tmp_path / "merged").exit_code == 0
    assert not (tmp_path / "merged" / "model-00001-of-00002.safetensors").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    weights = (base / "model.safetensors").read_bytes()
    for place in (mine, run, run / "adapter", base):
        result = invoke("merge", run, "--output", place)
        assert result.exit_code == 2
        told = f"error: {place} holds something that no merge of lorakit wrote; name another --output\n"
        assert result.stderr.endswith(told)
    assert (base / "model.safetensors").read_bytes() == weights
    assert (mine / "thesis.txt").read_text() == "years"


def test_a_bare_base_cannot_be_merged(base: Path, tmp_path: Path) -> None:
    result = invoke("merge", base, "--output", tmp_path / "merged")
    assert result.exit_code == 2
    assert result.stderr == f"error: {base} is a base without an adapter; give the folder of a run or an adapter\n"


def test_a_tied_weight_is_refused_and_untied_when_asked(base: Path, tmp_path: Path) -> None:
    tied = tmp_path / "tied"
    shutil.copytree(base, tied)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tied)
    recipe = write_recipe(tmp_path, tied, steps=1)
    values = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**values, "adapter": {"rank": 2, "targets": ["embed_tokens", "q_proj"]}}))
    assert invoke("train", recipe).exit_code == 0
    result = invoke("merge", tmp_path / "run", "--output", tmp_path / "merged")
    assert result.exit_code == 2
    assert "tied to" in result.stderr
    assert "--untie" in result.stderr
    said = answer("merge", tmp_path / "run", "--output", tmp_path / "merged", "--untie")
    assert said["max_abs_diff"] <= TOLERANCES["float32"] * said["largest_logit"]
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False


def test_an_update_that_rounding_would_swallow_is_not_written(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base, steps=3, lr=1e-5)
    assert invoke("train", recipe).exit_code == 0
    result = invoke("merge", tmp_path / "run", "--output", tmp_path / "merged", "--dtype", "bf16")
    assert result.exit_code == 2
    assert "so most of it would be lost; use --dtype fp32" in result.stderr
    assert not (tmp_path / "merged").exists()
    assert invoke("merge", tmp_path / "run", "--output", tmp_path / "merged", "--dtype", "fp32").exit_code == 0


@pytest.mark.parametrize("stream", [(), ("--stream",)])
@pytest.mark.parametrize("what", ["whole", "gain"])
def test_what_16_bits_round_away_is_not_called_merged(
    base: Path, tmp_path: Path, what: str, stream: tuple[str, ...]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    if what == "whole":
        attach(model, AdapterSpec(None, train=("*",)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 1e-4 * torch.randn_like(parameter))
    else:
        attach(model, AdapterSpec(IA3(), Targets(("k_proj", "v_proj"))))
        with torch.no_grad():
            for adapter in adapters_named(model, "default"):
                adapter.get_parameter("gain").add_(1e-3)
    save(state(model), tmp_path / "adapter", "native")
    narrow = invoke(
        "merge", tmp_path / "adapter", "--base", base, "--output", tmp_path / "m", "--dtype", "bf16", *stream
    )
    assert narrow.exit_code == 2, narrow.stdout
    assert re.search(r"rounding the merged weights would take \d\d+% of the update", narrow.stderr)
    assert "use --dtype fp32" in narrow.stderr
    wide = invoke("merge", tmp_path / "adapter", "--base", base, "--output", tmp_path / "m", "--dtype", "fp32", *stream)
    assert wide.exit_code == 0, wide.stderr
    told = "21 tensors that were trained whole" if what == "whole" else "4 layers"
    assert wide.stdout.splitlines()[0] == f"merged {told} into {base}, in float32"


def test_a_streamed_merge_writes_the_tensors_of_the_one_in_memory(run: Path, base: Path, tmp_path: Path) -> None:
    streamed = answer("merge", run, "--output", tmp_path / "streamed", "--stream")
    whole = answer("merge", run, "--output", tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("streamed", "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert streamed["stream"] is True
    assert (streamed["layers"], streamed["dtype"]) == (whole["layers"], whole["dtype"]) == (14, "float32")
    assert (streamed["files"], streamed["tensors"]) == (1, len(one))
    assert 0 < streamed["max_rel_diff"] < 1e-6
    assert streamed["worst_layer"].startswith("model.layers.")
    assert streamed["update_lost"] == whole["update_lost"] == 0
    assert streamed["seconds"] > 0
    assert streamed["bytes"] == sum(file.stat().st_size for file in (tmp_path / "streamed").iterdir())
    assert AutoTokenizer.from_pretrained(tmp_path / "streamed")("ab")["input_ids"] == [266]
    GenerationConfig.from_pretrained(tmp_path / "streamed")


def test_a_streamed_merge_says_what_it_did_and_replaces_only_a_merge(run: Path, base: Path, tmp_path: Path) -> None:
    for _ in range(2):
        result = invoke("merge", run, "--output", tmp_path / "merged", "--stream", "--dtype", "bf16")
        assert result.exit_code == 0, result.stderr
    assert re.fullmatch(
        rf"merged 14 layers into {base}, in bfloat16\n"
        r"on random inputs a merged layer differs from the adapted one by at most 0\.00\d+ of its largest output; "
        r"rounding took \d\.\d\d% of the update \(Frobenius\)\n"
        rf"wrote {tmp_path}/merged \([\d.]+ kB, 1 file of weights\) in [\d.]+ s; it loads with "
        r"AutoModelForCausalLM\.from_pretrained\n",
        result.stdout,
    ), result.stdout
    assert invoke("merge", run, "--output", base, "--stream").exit_code == 2


@pytest.mark.parametrize("option", ["--untie", "--lossy"])
def test_what_needs_the_whole_model_is_refused_with_stream(option: str, run: Path, tmp_path: Path) -> None:
    result = invoke("merge", run, "--output", tmp_path / "merged", "--stream", option)
    assert result.exit_code == 2
    assert result.stderr == f"error: {option} changes the model as a whole; leave --stream out, or {option}\n"


def test_a_streamed_merge_that_is_refused_writes_nothing_and_says_what_to_do(base: Path, tmp_path: Path) -> None:
    tied = tmp_path / "tied"
    shutil.copytree(base, tied)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tied)
    attach(model, AdapterSpec(LoRA(2), Targets(("embed_tokens",))))
    save(state(model), tmp_path / "adapter", "native")
    result = invoke("merge", tmp_path / "adapter", "--base", tied, "--output", tmp_path / "merged", "--stream")
    assert result.exit_code == 2
    assert (
        "embed_tokens: its weight is tied to lm_head.weight, which would change too; leave --stream out and give "
        in (result.stderr)
    )
    assert not (tmp_path / "merged").exists()
    recipe = write_recipe(tmp_path, base, steps=3, lr=1e-5)
    assert invoke("train", recipe).exit_code == 0
    result = invoke("merge", tmp_path / "run", "--output", tmp_path / "merged", "--stream", "--dtype", "bf16")
    assert result.exit_code == 2
    assert "so most of it would be lost; use --dtype fp32" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if "merged" in path.name) == []
