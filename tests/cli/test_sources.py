"""What a user named: a run, an adapter or a base, and what is said where it is none of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from lorakit.cli.sources import find
from lorakit.errors import AdapterFileError, LorakitError, RecipeError
from lorakit.persist import load, save


def test_a_run_brings_recipe_adapter_base_and_format(run: Path, base: Path) -> None:
    for named in (run, run / "adapter"):
        source = find(str(named))
        assert source.base == str(base)
        assert source.purpose is not None
        assert source.purpose.format == "prompt+completion"
        assert source.recipe is not None
        assert source.state is not None


def test_an_adapter_elsewhere_knows_its_base_and_how_its_rows_are_read(run: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "adapter", tmp_path / "mine")
    source = find(str(tmp_path / "mine"))
    assert (source.base, source.recipe, source.purpose) == (str(base), None, find(str(run)).purpose)
    assert source.data.separator == find(str(run)).data.separator == ""
    assert find(str(tmp_path / "mine"), base="other").base == "other"


def test_anything_else_is_a_base(base: Path) -> None:
    assert find(str(base)).state is None
    assert find("lorakit/tales").base == "lorakit/tales"


def test_a_base_cannot_sit_on_another(base: Path) -> None:
    with pytest.raises(AdapterFileError, match="cannot sit on --base other"):
        find(str(base), base="other")


def test_a_run_that_has_not_ended_says_how_to_go_on(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "recipe.yaml", tmp_path / "recipe.yaml")
    with pytest.raises(RecipeError) as error:
        find(str(tmp_path))
    assert str(error.value).endswith(f"go on with\n  lorakit train {tmp_path / 'recipe.yaml'} --resume")


def test_a_folder_with_nothing_in_it_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="is no adapter: it is empty"):
        find(str(tmp_path))


def test_a_loralib_file_is_to_be_converted_first(tmp_path: Path) -> None:
    old = tmp_path / "old.bin"
    torch.save({"layer.q.lora_A": torch.randn(2, 8), "layer.q.lora_B": torch.randn(8, 2)}, old)
    with pytest.raises(AdapterFileError) as error:
        find(str(old))
    assert str(error.value) == (
        f"{old} is an adapter of the original loralib, which stores neither its alpha nor its base; convert it first:\n"
        f"  lorakit convert {old} --to peft --alpha ALPHA --output DIR"
    )


def test_an_adapter_that_names_no_base_asks_for_one(tmp_path: Path) -> None:
    torch.save({"layer.q.lora_A": torch.randn(2, 8), "layer.q.lora_B": torch.randn(8, 2)}, tmp_path / "old.bin")
    save(load(tmp_path / "old.bin", alpha=4), tmp_path / "new")
    with pytest.raises(LorakitError, match="does not say which base it was trained on; name it with --base"):
        find(str(tmp_path / "new"))
