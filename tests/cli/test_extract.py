"""`lorakit extract`: a tuned model becomes an adapter, with what is lost and left out in words."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from lorakit import attach, load
from lorakit.training.base import load_base
from tests.cli.conftest import answer, invoke, write_recipe


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with every tensor moved, and its tokenizer."""
    folder = tmp_path_factory.mktemp("tuned") / "tuned"
    shutil.copytree(base, folder)
    model = load_base(str(base))[0]
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def test_it_says_what_is_lost_and_left_out(base: Path, tuned: Path, tmp_path: Path) -> None:
    said = invoke("extract", tuned, "--base", base, "--rank", 4, "--output", tmp_path / "adapter")
    assert said.exit_code == 0, said.stderr
    assert "14 updates of rank 4: " in said.stdout
    assert "from the change of their weights together (relative, Frobenius), so " in said.stdout
    assert "other tensors changed and are left out: " in said.stdout
    assert "--whole keeps those" in said.stdout
    found = answer("extract", tuned, "--base", base, "--rank", 4, "--output", tmp_path / "again")
    assert found["missing"] > found["error"] > 0.5, "a random change has no low rank"
    assert set(found["ranks"].values()) == {4}
    assert found["bytes"] == sum(file.stat().st_size for file in (tmp_path / "again").glob("adapter*"))


def test_whole_and_every_direction_is_the_tuned_model(base: Path, tuned: Path, tmp_path: Path) -> None:
    found = answer("extract", tuned, "--base", base, "--energy", 1, "--whole", "--output", tmp_path / "adapter")
    assert found["missing"] < 1e-5
    model, ids = load_base(str(base))[0], torch.arange(3, 15)[None]
    attach(model, load(tmp_path / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, load_base(str(tuned))[0](ids).logits, rtol=1e-4, atol=1e-5)


def test_a_run_of_full_fine_tuning_knows_its_base(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base, lr=1e-3)
    values = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**values, "adapter": {"method": "none", "train": "*"}}))
    assert invoke("train", recipe).exit_code == 0
    found = answer("extract", tmp_path / "run", "--rank", 2, "--output", tmp_path / "adapter")
    assert found["base"] == str(base)
    rows = ("--data", tmp_path / "valid.jsonl")
    full, part = (answer("evaluate", source, "--compare", *rows) for source in (tmp_path / "run", tmp_path / "adapter"))
    assert full["after"]["loss"] < part["after"]["loss"] < part["before"]["loss"], "two directions hold a part of it"


def test_wrong_commands_say_what_to_do(base: Path, tuned: Path, run: Path, tmp_path: Path) -> None:
    out = ("--output", tmp_path / "x")
    assert "name it with --base" in invoke("extract", tuned, "--rank", 2, *out).stderr
    assert "extract how much?" in invoke("extract", tuned, "--base", base, *out).stderr
    assert "lorakit compress makes it smaller" in invoke("extract", run, "--rank", 2, *out).stderr
    assert "the models are the same" in invoke("extract", base, "--base", base, "--rank", 2, *out).stderr
    assert "matched no" in invoke("extract", tuned, "--base", base, "--rank", 2, "--targets", "q_prj", *out).stderr
    assert not (tmp_path / "x").exists()
