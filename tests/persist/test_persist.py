"""`load` recognises each format and says what it found instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.errors import AdapterFileError
from lorakit.persist import load, save
from tests.persist.samples import adapter, same


@pytest.mark.parametrize(("first", "second"), [("peft", "native"), ("native", "peft")])
def test_the_last_save_is_the_one_that_loads(first: Any, second: Any, tmp_path: Path) -> None:
    save(adapter(1.0), tmp_path, first)
    save(adapter(2.0), tmp_path, second)
    assert same(load(tmp_path), adapter(2.0))


def test_a_missing_path_names_its_nearest_sibling(tmp_path: Path) -> None:
    save(adapter(), tmp_path / "summaries")
    with pytest.raises(AdapterFileError, match=r"sumaries does not exist; did you mean 'summaries'\?"):
        load(tmp_path / "sumaries")
    with pytest.raises(AdapterFileError, match="nowhere/a does not exist; nor does .*nowhere"):
        load(tmp_path / "nowhere" / "a")


def test_a_full_model_is_told_from_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterFileError, match="it holds a full model; give it as the base"):
        load(tmp_path)


def test_a_directory_of_something_else_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="is no adapter: it is empty"):
        load(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(AdapterFileError, match=r"expected adapter_config\.json .* found notes\.txt"):
        load(tmp_path)
    torch.save({}, tmp_path / "lora.bin")
    with pytest.raises(AdapterFileError, match=r"it holds lora\.bin; if that is a loralib adapter"):
        load(tmp_path)
    with pytest.raises(AdapterFileError, match=r"notes\.txt is a file; give the adapter's directory"):
        load(tmp_path / "notes.txt")


def test_two_formats_in_one_directory_are_not_guessed_between(tmp_path: Path) -> None:
    save(adapter(), tmp_path / "a")
    save(adapter(), tmp_path / "b", "native")
    for file in (tmp_path / "b").iterdir():
        file.rename(tmp_path / "a" / file.name)
    with pytest.raises(AdapterFileError, match="holds two adapters"):
        load(tmp_path / "a")


def test_an_unknown_format_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"unknown format 'peff'; did you mean 'peft'\?"):
        save(adapter(), tmp_path / "a", "peff")  # type: ignore[arg-type]
    assert not (tmp_path / "a").exists()
