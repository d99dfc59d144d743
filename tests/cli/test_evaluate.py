"""`lorakit evaluate`: before and after on the run's own held-out rows, without repeating anything."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import yaml
from safetensors.torch import load_file, save_file

from lorakit.training.run import Run
from tests.cli.conftest import answer, invoke
from tests.training import samples


def test_a_run_is_scored_before_and_after_on_its_validation_data(run: Path, base: Path) -> None:
    said = answer("evaluate", run)
    assert list(said) == ["source", "base", "data", "before", "after"]
    assert said["base"] == str(base)
    assert said["data"].endswith("valid.jsonl")
    assert said["after"]["loss"] < said["before"]["loss"]
    # the same rows and the same adapter as in training, in another order of sums
    assert math.isclose(said["after"]["loss"], Run.read(run).validation_loss or 0.0, rel_tol=1e-5)


def test_the_table_has_a_column_before_and_one_after(run: Path) -> None:
    result = invoke("evaluate", run)
    assert re.search(r"^ +before +after *$", result.stdout, re.MULTILINE), result.stdout
    assert re.search(r"^perplexity +[\d.]+ +[\d.]+ *$", result.stdout, re.MULTILINE), result.stdout
    assert "\x1b" not in result.stdout


def test_other_data_a_limit_and_no_comparison(run: Path, tmp_path: Path) -> None:
    file = samples.write_rows(tmp_path / "more.jsonl", samples.pairs(9, 200))
    said = answer("evaluate", run, "--data", file, "--limit", 4, "--no-compare")
    assert said["after"]["rows"] == 4
    assert "before" not in said


def test_a_base_alone_is_scored_as_it_is(base: Path, run: Path) -> None:
    said = answer("evaluate", base, "--data", run.parent / "valid.jsonl")
    assert "after" not in said
    assert math.isclose(said["before"]["loss"], answer("evaluate", run)["before"]["loss"], rel_tol=1e-6)


def test_bleu_is_added_when_asked_for(run: Path) -> None:
    said = answer("evaluate", run, "--bleu", "--limit", 2, "--no-compare", "--max-new-tokens", 4)
    assert 0 <= said["after"]["bleu"] <= 100


def test_without_data_it_asks_for_some(base: Path) -> None:
    result = invoke("evaluate", base)
    assert result.exit_code == 2
    assert result.stderr == f"error: {base} names no validation data; give some with --data FILE\n"


def test_logits_that_are_nan_are_no_score(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "adapter", tmp_path / "huge")
    (tmp_path / "huge" / "lorakit.json").unlink()
    file = tmp_path / "huge" / "adapter_model.safetensors"
    save_file({name: tensor * 1e30 for name, tensor in load_file(file).items()}, file)
    valid = run.parent / "valid.jsonl"
    for verb in (["evaluate", tmp_path / "huge", "--no-compare"],
                 ["compress", tmp_path / "huge", "--within", 0.01, "--output", tmp_path / "small"]):  # fmt: skip
        refused = invoke(*verb, "--data", valid)
        assert refused.exit_code == 2, refused.stdout
        assert "the model's logits are NaN" in refused.stderr


def test_a_base_that_moved_is_asked_for(run: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "adapter", tmp_path / "mine")
    config = tmp_path / "mine" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base), str(tmp_path / "gone")))
    (tmp_path / "mine" / "lorakit.json").unlink()
    refused = invoke("evaluate", tmp_path / "mine", "--data", run.parent / "valid.jsonl")
    assert refused.exit_code == 2
    assert refused.stderr.endswith("the adapter has this name of its base; name where it is with --base\n")


def test_a_classifier_is_scored_by_class(tmp_path: Path) -> None:
    encoder = samples.save_encoder(tmp_path / "bert")
    recipe = tmp_path / "recipe.yaml"
    values = {
        "model": str(encoder),
        "data": {"train": samples.write_rows(tmp_path / "train.jsonl", samples.labelled(32)),
                 "validation": samples.write_rows(tmp_path / "valid.jsonl", samples.labelled(8, 32))},
        "adapter": {"rank": 2, "alpha": 4},
        "train": {"steps": 2, "lr": 1e-3, "device": "cpu"},
        "output": str(tmp_path / "run"),
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump(values))
    assert invoke("train", recipe).exit_code == 0
    result = invoke("evaluate", tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    assert "the base has no trained head" in result.stderr
    assert re.search(r"^accuracy +[\d.]+%", result.stdout, re.MULTILINE), result.stdout
    assert re.search(r"^class +rows +predicted +correct", result.stdout, re.MULTILINE), result.stdout
    shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "mine")
    valid = ("--data", tmp_path / "valid.jsonl")
    scores = [answer("evaluate", tmp_path / place, *valid)["after"]["loss"] for place in ("run", "mine")]
    assert scores[0] == scores[1]
    merged = answer("merge", tmp_path / "run", "--output", tmp_path / "merged")
    assert merged["max_abs_diff"] < 1e-5
    alone = answer("evaluate", tmp_path / "merged", *valid)
    assert math.isclose(alone["before"]["loss"], scores[0], rel_tol=1e-4)
    assert alone["before"]["classes"].keys() == {"high", "low"}
    for place in ("run", "merged"):
        no = invoke("generate", tmp_path / place, "--prompt", "a")
        assert no.exit_code == 2
        assert no.stderr.endswith(f"which writes no answers; score it: lorakit evaluate {tmp_path / place}\n")


def test_a_merged_classifier_of_the_decoder_family_is_no_language_model(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(base, id2label={0: "low", 1: "high"})
    model.config.tie_word_embeddings = True  # so that a language model would find all of its weights
    model.save_pretrained(tmp_path / "classifier")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "classifier")
    no = invoke("generate", tmp_path / "classifier", "--prompt", "a")
    assert no.exit_code == 2
    assert "is a classifier, which writes no answers" in no.stderr
    rows = samples.write_rows(tmp_path / "rows.jsonl", samples.labelled(6))
    assert list(answer("evaluate", tmp_path / "classifier", "--data", rows)["before"]["classes"]) == ["low", "high"]


def test_rows_that_are_not_there_are_missed_before_the_base_is_loaded(
    finished: tuple[Path, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.training.base.load_base", None)
    no = invoke("evaluate", finished[0], "--data", tmp_path / "missing.jsonl")
    assert no.exit_code == 2
    assert f"{tmp_path / 'missing.jsonl'}: no such file or folder" in no.stderr
