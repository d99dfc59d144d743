"""`lorakit quantize`, and merging into what it wrote."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from lorakit.training.base import load_base
from tests.cli.conftest import answer, invoke, write_recipe


@pytest.fixture(scope="module")
def packed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "base"
    assert invoke("quantize", base, "--output", folder).exit_code == 0
    return folder


def test_it_writes_a_base_that_loads_and_says_what_it_cost(base: Path, tmp_path: Path) -> None:
    said = answer("quantize", base, "--output", tmp_path / "packed", "--kind", "fp4", "--no-double-quant")
    assert said["layers"] == 14
    assert said["bits_per_weight"] == pytest.approx(4.5)
    assert 0.1 < said["relative_error"] < said["worst_error"] < 0.2
    assert said["worst"].startswith("model.layers.")
    assert said["bytes"] < said["bytes_before"]
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bnb_4bit_quant_type"]) == ("bitsandbytes", "fp4")
    assert config["llm_int8_skip_modules"] == ["lm_head"]
    load_base(str(tmp_path / "packed"))


def test_what_it_says_can_be_pasted(base: Path, tmp_path: Path) -> None:
    result = invoke("quantize", base, "--output", tmp_path / "packed")
    lines = result.stdout.splitlines()
    assert lines[0] == f"packed 14 layers of {base} into nf4, 4.183 bits a weight"
    assert lines[-1] == f"wrote {tmp_path / 'packed'}; train on it with model: {tmp_path / 'packed'}, merge into {base}"


def test_it_names_the_layers_that_another_tool_may_misread(base: Path, tmp_path: Path) -> None:
    said = " ".join(invoke("quantize", base, "--output", tmp_path / "packed", "--block-size", 4096).stdout.split())
    assert "in 14 layers a row is no whole number of blocks of 4096: model.layers.0." in said
    few = invoke("quantize", base, "--output", tmp_path / "narrow", "--block-size", 32).stdout
    assert "in 2 layers" in few, "those of 48 columns alone: the others have 32"


def test_its_files_have_the_mode_of_any_other(base: Path, tmp_path: Path) -> None:
    assert invoke("quantize", base, "--output", tmp_path / "packed").exit_code == 0
    (tmp_path / "usual").touch()
    modes = {file.stat().st_mode for file in (tmp_path / "packed").iterdir()}
    assert modes == {(tmp_path / "usual").stat().st_mode}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--block-size", 48), "--block-size 48: must be one of 32, 64, 128"),
        (("--kind", "nf3"), "'nf3' is not one of 'nf4', 'fp4'"),
    ],
)
def test_wrong_options_say_the_right_ones(
    base: Path, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    result = invoke("quantize", base, "--output", tmp_path / "packed", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "packed").exists()


def test_it_overwrites_nothing_and_packs_nothing_twice(packed: Path, base: Path, tmp_path: Path) -> None:
    assert "is there already; name another --output" in invoke("quantize", base, "--output", packed).stderr
    result = invoke("quantize", packed, "--output", tmp_path / "again")
    assert result.stderr.splitlines()[-1] == (
        f"error: {packed} is packed into 4 bits already; give the base it was made of"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
def test_a_conversion_that_stops_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    from lorakit.training import quantised

    def stopping(*_: object) -> None:
        (next(tmp_path.iterdir()) / "model.safetensors").write_text("half")
        raise stop

    monkeypatch.setattr(quantised, "write_packed", stopping)
    result = invoke("quantize", base, "--output", tmp_path / "packed")
    assert result.exit_code in (2, 130)
    assert list(tmp_path.iterdir()) == []


def test_a_run_on_4_bits_merges_into_its_16_bit_base(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base)
    trained = invoke("train", recipe, "--set", "quant=nf4")
    assert trained.stdout.splitlines()[-1] == f"  lorakit merge {tmp_path}/run --output {tmp_path}/run/merged"
    said = answer("merge", tmp_path / "run", "--output", tmp_path / "merged")
    assert said["update_lost"] < 1e-5
    shown = invoke("merge", tmp_path / "run", "--output", tmp_path / "merged").stdout
    assert "the run trained on nf4, and these weights are those from before packing" in shown
    merged, _ = load_base(str(tmp_path / "merged"))
    assert merged.lm_head.weight.dtype == merged.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    scored = answer("evaluate", tmp_path / "run")
    dense = answer("evaluate", tmp_path / "merged", "--data", tmp_path / "valid.jsonl")
    assert scored["after"]["loss"] == pytest.approx(dense["before"]["loss"], rel=0.1)
    assert scored["after"]["loss"] != dense["before"]["loss"], "the run is scored on 4 bits, as it was trained"


def test_merging_into_4_bits_is_asked_for_and_measured(packed: Path, base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, packed)
    trained = invoke("train", recipe)
    assert f"lorakit merge {tmp_path}/run --base THE_16_BIT_BASE --output" in trained.stdout
    refused = invoke("merge", tmp_path / "run", "--output", tmp_path / "merged")
    assert refused.exit_code == 2
    assert (
        "its weight is quantised (4-bit), and the sum would be rounded again; merge into the 16-bit base, named with "
        "--base; or give --dequantize, which writes this one dense, or give --lossy: model.layers.0.self_attn.q_proj"
    ) in refused.stderr
    assert not (tmp_path / "merged").exists()
    said = answer("merge", tmp_path / "run", "--lossy", "--output", tmp_path / "merged")
    assert said["update_lost"] > 0.05
    assert said["max_abs_diff"] > 1e-3
    shown = invoke("merge", tmp_path / "run", "--lossy", "--output", tmp_path / "merged").stdout
    assert "rounding to 4 bits moved the weights by" in shown
    assert ", in 4 bits and float32" in shown
    load_base(str(tmp_path / "merged"))
    assert answer("merge", tmp_path / "run", "--base", base, "--output", tmp_path / "dense")["update_lost"] < 1e-5


def test_merging_into_what_4_bits_stand_for_gives_the_trained_model(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base)
    trained = invoke("train", recipe, "--set", "quant=nf4", "--set", "adapter.init=loftq")
    assert f"lorakit merge {tmp_path}/run --dequantize --output" in trained.stdout
    refused = invoke("merge", tmp_path / "run", "--output", tmp_path / "merged")
    assert refused.exit_code == 2
    assert "part of it corrects what 4 bits lost" in refused.stderr
    said = answer("merge", tmp_path / "run", "--dequantize", "--output", tmp_path / "merged")
    assert said["update_lost"] < 1e-5
    scored = answer("evaluate", tmp_path / "run")["after"]["loss"]
    merged = answer("evaluate", tmp_path / "merged", "--data", tmp_path / "valid.jsonl")["before"]["loss"]
    assert scored == pytest.approx(merged, rel=1e-5)


def test_a_dense_base_cannot_be_dequantized(base: Path, tmp_path: Path) -> None:
    assert invoke("train", write_recipe(tmp_path, base)).exit_code == 0
    for option in ("--dequantize", "--lossy"):
        refused = invoke("merge", tmp_path / "run", option, "--output", tmp_path / "merged")
        assert f"{base} is not in 4 bits, so {option} means nothing here; leave it out" in refused.stderr
    refused = invoke("merge", tmp_path / "run", "--lossy", "--dequantize", "--output", tmp_path / "merged")
    assert "--lossy writes 4 bits and --dequantize writes none; give one of them" in refused.stderr
