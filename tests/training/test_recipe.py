"""The recipe: numbers are numbers, unknown keys are errors that name the near ones, and files read back equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lorakit import LoRA
from lorakit.errors import RecipeError
from lorakit.training.recipe import Recipe, load_recipe, make_recipe, scalar
from tests.conftest import ROOT

WRITTEN = """
model: lorakit/tales
data: {train: train.jsonl, validation: valid.jsonl}
adapter: {method: lora, rank: 8, alpha: 16, targets: [q_proj, v_proj], layers: top:2}
train: {epochs: 2, lr: 1e-4, batch_tokens: 4096}
output: runs/first
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(WRITTEN)
    return tmp_path / "recipe.yaml"


def test_a_recipe_is_read_with_its_types(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.train.lr == 1e-4
    assert recipe.adapter.targets == ("q_proj", "v_proj")
    spec = recipe.adapter.spec(seed=3)
    assert (spec.method, spec.targets.include, spec.targets.layers, spec.seed) == (
        LoRA(8, 16),
        ("q_proj", "v_proj"),
        "top:2",
        3,
    )


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "+1e-4", "1e4", "-2e-3"])
def test_exponents_without_a_point_are_numbers(text: str) -> None:
    assert scalar(text) == float(text)


def test_changes_go_on_top(file: Path) -> None:
    recipe = load_recipe(file, {"train.lr": 1e-3, "output": "elsewhere", "adapter.rank": 4})
    assert (recipe.train.lr, recipe.output, recipe.adapter.build_method()) == (1e-3, "elsewhere", LoRA(4, 16))


def test_a_recipe_written_out_reads_back_equal(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file)
    (tmp_path / "whole.yaml").write_text(recipe.to_yaml())
    again = load_recipe(tmp_path / "whole.yaml")
    assert again == recipe
    assert recipe.differences(again) == []


def test_every_problem_is_listed_with_the_near_words() -> None:
    with pytest.raises(RecipeError) as refused:
        make_recipe({"modle": "x", "train": {"learning_rate": 1e-4, "schedule": "cosin", "batch_tokns": 3}})
    text = str(refused.value)
    assert "4 problem(s)" in text
    assert "modle: unknown key; did you mean 'model'?" in text
    assert "train.batch_tokns: unknown key; did you mean 'batch_tokens'" in text
    assert "train.schedule: input should be 'cosine', 'linear' or 'constant' (given 'cosin')" in text


def test_a_key_in_the_wrong_section_is_sent_to_the_right_one() -> None:
    with pytest.raises(RecipeError, match=r"lr: unknown key; did you mean train\.lr\?"):
        make_recipe({"lr": 1e-4})


def test_a_field_the_method_has_not_is_refused() -> None:
    with pytest.raises(RecipeError, match="'rnak'; did you mean 'rank'"):
        make_recipe({"adapter": {"rnak": 4}})
    with pytest.raises(RecipeError, match="rank must be a whole number of at least 1, not 0"):
        make_recipe({"adapter": {"rank": 0}})


def test_both_units_of_a_batch_are_refused() -> None:
    with pytest.raises(RecipeError, match="give batch_tokens or batch_size, not both"):
        make_recipe({"train": {"batch_tokens": 4096, "batch_size": 8}})


def test_files_that_are_no_recipe_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*none\.yaml: No such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(RecipeError, match=r"bad\.yaml is not YAML"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(RecipeError, match="must hold keys"):
        load_recipe(tmp_path / "list.yaml")


def test_differences_name_key_old_and_new() -> None:
    one, other = make_recipe({"train": {"lr": 1e-4}}), make_recipe({"train": {"lr": 1e-3}, "adapter": {"rank": 8}})
    assert one.differences(other) == ["adapter.rank: None -> 8", "train.lr: 0.0001 -> 0.001"]


def shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "none" if value in (None, []) else str(value)


def test_the_page_names_every_key_with_its_default() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    rows = []
    for key, value in yaml.safe_load(Recipe().to_yaml()).items():
        section = value if isinstance(value, dict) else {"": value}
        rows += [f"| `{f'{key}.{name}'.rstrip('.')}` | {shown(default)} |" for name, default in section.items()]
    assert not [row for row in rows if row not in page]
    assert page.count("\n| `") == len(rows)


@pytest.mark.parametrize("text", ["lr: -1", "lr: 0", "lr: .nan", "lr: .inf", "epochs: .inf", "clip: .nan"])
def test_numbers_that_cannot_train_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(f"train: {{{text}}}")
    with pytest.raises(RecipeError, match=rf"has 1 problem\(s\):\n  - train\.{text.partition(':')[0]}: "):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_key_that_stands_twice_is_named_with_its_lines(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("train:\n  lr: 1e-4\n  epochs: 2\n  lr: 1e-3\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml line 4: 'lr' stands in line 2 already; keep one"):
        load_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_text("train: {lr: 1e-4, lr: 1e-3}")
    with pytest.raises(RecipeError, match=r"'lr' stands in line 1 already"):
        load_recipe(tmp_path / "recipe.yaml")
