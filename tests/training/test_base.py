"""Bases: how a name is read, and what is refused before an hour is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from lorakit import AdapterSpec, LoRA, attach, state
from lorakit.errors import DataError, DeviceError, LorakitError, RecipeError
from lorakit.training.base import (
    ASSETS,
    bundled,
    choose_device,
    choose_dtype,
    load_base,
    load_model,
    load_tokenizer,
    times_fp32,
)
from tests.training.samples import save_base


def test_a_directory_is_loaded_for_evaluation_in_fp32_on_the_cpu(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load_base(str(base), device="cpu")
    assert (model.dtype, model.device.type, model.training) == (torch.float32, "cpu", False)
    assert tokenizer("ab")["input_ids"] == [266]
    assert capfd.readouterr() == ("", "")


def test_the_bundled_base_has_a_name() -> None:
    if not ASSETS.is_dir():
        pytest.skip("the bundled base is not in this checkout")
    assert "lorakit/tales" in bundled()
    model, tokenizer = load_base("lorakit/tales", device="cpu")
    attach(model, AdapterSpec(LoRA(rank=2, alpha=2)))
    assert state(model).base.name == "lorakit/tales", "an adapter names its base as the user did, not by a path"
    assert len(tokenizer) <= model.get_input_embeddings().num_embeddings


def test_an_unknown_name_is_refused_in_both_readings_with_the_near_ones(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.training.base.bundled", lambda: ["lorakit/tales"])
    with pytest.raises(LorakitError) as refused:
        load_base("lorakit/tails")
    text = str(refused.value)
    assert "neither a local directory (looked in " in text
    assert "nor a model the Hugging Face hub" in text
    assert "did you mean 'lorakit/tales'?" in text
    with pytest.raises(LorakitError, match=r"did you mean '.*llama'"):
        load_base(str(base.with_name("lama")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(LorakitError, match="is no model: it has no config.json, it is empty"):
        load_base(str(tmp_path / "empty"))


def test_a_directory_without_a_tokenizer_is_named_with_what_to_do(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(LorakitError) as refused:
        load_tokenizer(str(tmp_path / "bare"))
    assert str(refused.value) == (
        f"the directory {tmp_path / 'bare'} has no tokenizer, so no text can be read; copy tokenizer.json and "
        "tokenizer_config.json into it from where the model came from (tokenizer.save_pretrained writes them)"
    )


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(tmp_path: Path) -> None:
    small = save_base(tmp_path / "small", vocabulary=200)
    with pytest.raises(DataError, match=r"ids go up to 266 \('ab'\), the model has only 200 rows"):
        load_base(str(small))


def test_a_checkpoint_with_missing_weights_is_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "cut")
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    (tmp_path / "cut" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(LorakitError, match=r"no fitting values for 9 of its weights \(model\.layers\.2\."):
        load_base(str(tmp_path / "cut"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_absent_is_named_with_those_that_are_there() -> None:
    with pytest.raises(DeviceError, match=r"'cuda' was asked for and is not there; there is: .*cpu"):
        choose_device("cuda")
    assert choose_device("auto").type in ("cpu", "mps")


def test_dtypes_are_those_the_device_can_train_in() -> None:
    cpu = torch.device("cpu")
    assert choose_dtype("auto", cpu) == torch.float32
    assert choose_dtype("bf16", cpu) == torch.bfloat16
    with pytest.raises(DeviceError, match="fp16 training needs a CUDA device"):
        choose_dtype("fp16", cpu)
    with pytest.raises(RecipeError, match="did you mean 'bf16'"):
        choose_dtype("bf61", cpu)


def test_a_processor_without_16_bit_products_is_known_by_its_pace() -> None:
    times = times_fp32(torch.bfloat16)
    assert 0.1 < times < 1000
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert times > 3


def test_a_tokenizer_without_padding_pads_with_its_end(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token_id == tokenizer.eos_token_id


def test_a_classifier_gets_its_labels_and_tells_what_is_fresh(encoder: Path) -> None:
    tokenizer = load_tokenizer(str(encoder))
    loaded = load_model(str(encoder), tokenizer, task="classification", labels=("low", "high"))
    assert loaded.model.config.id2label == {0: "low", 1: "high"}
    assert loaded.fresh == ("classifier",)
    with pytest.raises(DataError, match="two labels or more"):
        load_model(str(encoder), tokenizer, task="classification", labels=("low",))


def test_a_classifier_of_other_labels_is_refused(encoder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_base(str(encoder), task="classification", labels=("a", "b", "c"))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(LorakitError, match="holds no model that can be loaded"):
        load_base(str(tmp_path), task="classification", labels=("a", "b"))


def test_a_name_that_is_plainly_local_and_no_model_says_why(base: Path, tmp_path: Path) -> None:
    rows, empty, data, adapter = (tmp_path / name for name in ("train.jsonl", "empty", "data", "adapter"))
    rows.write_text("{}\n")
    for folder, file in ((empty, None), (data, "a.jsonl"), (adapter, "adapter_config.json")):
        folder.mkdir()
        if file:
            (folder / file).write_text("{}")
    for name, said in {
        rows: f"{rows} is a file; a base is a directory in the Hugging Face layout, or the name of one",
        empty: f"the directory {empty} is no model: it has no config.json, it is empty",
        data: f"the directory {data} is no model: it has no config.json, it holds a.jsonl",
        adapter: f"the directory {adapter} is no model: it has no config.json, it holds adapter_config.json; it is an "
        "adapter, which `lorakit generate` and `evaluate` take as it is",
        tmp_path / "dota": f"there is no directory {tmp_path / 'dota'}; did you mean 'data'?",
    }.items():
        with pytest.raises(LorakitError) as error:
            load_base(str(name))
        assert str(error.value) == said


def test_a_relative_place_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LorakitError, match=f"there is no directory none; looked for {tmp_path}/none$"):
        load_base("./none")
