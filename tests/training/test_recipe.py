"""The recipe: numbers are numbers, unknown keys are errors that name the near ones, and files read back equal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorakit import LoRA
from lorakit.errors import RecipeError
from lorakit.training.recipe import QuantSection, Recipe, load_recipe, make_recipe, scalar
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
    assert "the recipe has 4 problems:" in text
    assert "modle: unknown key; did you mean 'model'?" in text
    assert "train.batch_tokns: unknown key; did you mean 'batch_tokens'" in text
    assert "train.schedule: expected cosine, linear or constant, given 'cosin'; did you mean 'cosine'?" in text


def test_a_key_in_the_wrong_section_is_sent_to_the_right_one() -> None:
    with pytest.raises(RecipeError, match=r"lr: unknown key; did you mean train\.lr\?"):
        make_recipe({"lr": 1e-4})


def test_a_field_the_method_has_not_is_refused() -> None:
    with pytest.raises(RecipeError, match="'rnak'; did you mean 'rank'") as one:
        make_recipe({"adapter": {"rnak": 4}})
    assert str(one.value).count("did you mean") == 1  # the section's own `train` is near as well, and not meant
    with pytest.raises(RecipeError, match="no field 'exclud'; .*; did you mean 'exclude'"):
        make_recipe({"adapter": {"exclud": "q_proj"}})
    with pytest.raises(RecipeError, match=r"adapter\.rank: must be a whole number of at least 1, not 0"):
        make_recipe({"adapter": {"rank": 0}})
    with pytest.raises(RecipeError, match="has 3 problems") as several:
        make_recipe({"adapter": {"rnak": 4, "alhpa": 8, "xx": 1}})
    for field in ("rnak", "alhpa", "xx"):
        assert f"adapter.{field}: method lora has no field '{field}'" in str(several.value)


@pytest.mark.parametrize(
    ("init", "said"),
    [
        ({"name": "pissa", "iteration": 16}, "pissa has no field 'iteration'; did you mean 'iterations'"),
        ({"name": "eva", "rho": 0}, "eva: rho must be a number from 1, not 0"),
        ({"name": "pisa"}, "unknown initialisation 'pisa'; did you mean 'pissa'"),
        ("pisa", "unknown initialisation 'pisa'; did you mean 'pissa'"),
    ],
)
def test_a_fault_of_a_start_is_told_of_the_start(init: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=rf"adapter\.init: {said}"):
        make_recipe({"adapter": {"init": init}})


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
    with pytest.raises(RecipeError, match="No such file or directory; did you mean 'list.yaml'"):
        load_recipe(tmp_path / "list.yml")
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
    rows += [f"| `quant.{name}` | {shown(default)} |" for name, default in QuantSection().model_dump().items()]
    assert not [row for row in rows if row not in page]
    assert page.count("\n| `") == len(rows)


@pytest.mark.parametrize("text", ["lr: -1", "lr: 0", "lr: .nan", "lr: .inf", "epochs: .inf", "clip: .nan"])
def test_numbers_that_cannot_train_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(f"train: {{{text}}}")
    with pytest.raises(RecipeError, match=rf"has 1 problem:\n  - train\.{text.partition(':')[0]}: "):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_key_that_stands_twice_is_named_with_its_lines(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("train:\n  lr: 1e-4\n  epochs: 2\n  lr: 1e-3\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml line 4: 'lr' stands in line 2 already; keep one"):
        load_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_text("train: {lr: 1e-4, lr: 1e-3}")
    with pytest.raises(RecipeError, match=r"'lr' stands in line 1 already"):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"train": {"lr": "fast"}}, "train.lr: expected a number or auto, given 'fast'"),
        ({"train": {"lr": -1}}, "train.lr: must be a finite number above 0, or auto, given -1"),
        ({"train": 5}, "train: expected a section of keys, given 5"),
        ({"train": None}, "train: expected a section of keys, given nothing"),
        ({"train": {"checkpointing": "perhaps"}},
         "train.checkpointing: expected true or false or a number, given 'perhaps'"),
        ({"train": {"steps": 1.5}}, "train.steps: expected a whole number, given 1.5"),
        ({"train": {"steps": 10**400}},
         "train.steps: expected at most 1000000000, given an integer of about 400 digits"),
        ({"train": {"seed": 2**32}}, "train.seed: expected at most 4294967295, given 4294967296"),
        ({"train": {"report_to": "wanbd"}},
         "train.report_to: expected tensorboard or wandb, given 'wanbd'; did you mean 'wandb'?"),
        ({"data": {"labels": "good"}}, "data.labels: expected a list, given 'good'"),
        ({"adapter": {"targets": ["q", 3]}}, "adapter.targets: expected a list of words, given ['q', 3]"),
        ({"adapter": {"targets": []}}, "adapter.targets: is empty; name at least one pattern, for example all-linear"),
        ({"adapter": {"dropout": 1}}, "adapter.dropout: expected less than 1.0, given 1"),
        ({"adapter": {"layers": "2o-24"}},
         "adapter.layers: '2o-24' is not understood; write 20-24, top:5, bottom:2 or 0,3,8-11"),
        ({"adapter": {"rank": 10**400}},
         "adapter.rank: expected at most 1000000000, given an integer of about 400 digits"),
        ({"adapter": {"overrides": [{"targets": "mlp"}]}}, "adapter.overrides.0.fields: is missing"),
        ({"adapter": {"overrides": [{"targets": "mlp", "fields": {"rank": 0}}]}},
         "adapter.overrides[0]: rank must be a whole number of at least 1, not 0; exclude a layer to skip it"),
        ({"model": "x" * 500, "task": "y" * 500},
         f"task: expected auto, causal-lm or classification, given '{'y' * 55} ..."),
        ({3: 4}, "3: expected a word as the key, given 3"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_in_one_line_in_the_user_s_words(values: dict[str, Any], line: str) -> None:
    with pytest.raises(RecipeError) as refused:
        make_recipe(values, "mine.yaml")
    assert str(refused.value) == f"mine.yaml has 1 problem:\n  - {line}"


def test_one_tracker_may_stand_without_a_list() -> None:
    assert make_recipe({"train": {"report_to": "wandb"}}).train.report_to == ("wandb",)


def test_what_the_command_line_set_is_said_so(file: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe(file, {"train.lr": "fast", "output": " "})
    assert str(refused.value) == (
        f"{file} has 2 problems:\n"
        "  - train.lr: expected a number or auto, given 'fast' (from --set)\n"
        "  - output: must name a folder, such as runs/first, given ' ' (from --output or --set)"
    )


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("train: {lr: [1}", "is not YAML: expected ',' or ']', but got '}' in line 1 column 15"),
        ("train: {steps: " + "9" * 5000 + "}", "is not YAML: an integer of more than 4,300 digits"),
        ("a: " + "[" * 5000, "is nested too deeply"),
        ("a: " + "[" * 200 + "]" * 200, "is nested more than 100 deep"),
        ("a: &a [*a]", "holds something inside itself (an alias to its own anchor)"),
        ("when: 2024-13-45", "is not YAML: month must be in 1..12"),
        ('model: "\\ud800"', "holds half a character (a lone surrogate such as \\ud800); write the whole one"),
        ("adapter: {targets: [c_attn[q,v], q_proj]}",
         "is not YAML: expected ',' or ']', but got '[' in line 1 column 27; put a name with [...] inside a list in "
         'quotes: ["c_attn[q,v]", q_proj]'),
    ],
)  # fmt: skip
def test_yaml_that_cannot_be_read_names_the_file_and_the_reason(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError) as refused:
        load_recipe(tmp_path / "recipe.yaml")
    assert str(refused.value) == f"{tmp_path / 'recipe.yaml'} {what}"


def test_a_recipe_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"model: x\noutput: caf\xe9\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml line 2: not UTF-8 text; convert the file to UTF-8"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_relative_recipe_that_is_not_there_says_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=rf"No such file or directory; looked for {tmp_path}/mine\.yaml$"):
        load_recipe("mine.yaml")


def test_a_method_s_own_targets_and_train_are_taken_and_written_out(tmp_path: Path) -> None:
    recipe = make_recipe({"adapter": {"method": "houlsby", "layers": "5-11"}})
    assert (recipe.adapter.targets, recipe.adapter.train) == (("attention-out", "mlp-out"), "norms")
    spec = recipe.adapter.spec(seed=0)
    assert (spec.targets.include, spec.targets.layers, spec.train) == (("attention-out", "mlp-out"), "5-11", ("norms",))
    (tmp_path / "whole.yaml").write_text(recipe.to_yaml())
    assert "- attention-out" in (tmp_path / "whole.yaml").read_text()
    assert recipe.differences(load_recipe(tmp_path / "whole.yaml")) == []


def test_what_a_recipe_names_stands_in_the_place_of_the_method_s_own() -> None:
    adapter = make_recipe({"adapter": {"method": "houlsby", "targets": "down_proj", "train": []}}).adapter
    assert (adapter.targets, adapter.train) == ("down_proj", ())
    beside = make_recipe({"adapter": {"method": "parallel", "train": ["classifier"]}}).adapter
    assert (beside.targets, beside.train) == ("mlp-module", ("classifier",))


def test_a_method_without_its_own_goes_to_all_linear_layers_named_or_not() -> None:
    assert make_recipe({"adapter": {"method": "lora"}}) == make_recipe({}) == Recipe()
    assert make_recipe({"adapter": {"method": "none", "train": "norms"}}).adapter.targets == "all-linear"


def test_the_short_form_of_quant_takes_changes_of_its_section(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("quant: nf4\n")
    assert load_recipe(file, {"quant.block_size": 128}).quant == QuantSection(block_size=128)
    assert load_recipe(file, {"quant.kind": "fp4"}).quant == QuantSection(kind="fp4")
    assert load_recipe(file, {"quant": "none"}).quant is None


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        ({"overrides": [{"targets": "mlp", "rank": 8}]}, "has targets, layers and fields: write fields: {rank: ...}"),
        ({"method": "adalora", "kept": 3}, "adapter.kept: is what a run writes into its adapter; leave it out"),
        ({"layers": "5-2"}, "adapter.layers: '5-2' runs backwards; write 2-5"),
    ],
)
def test_what_an_adapter_s_section_cannot_hold_says_where_it_goes(adapter: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(told)):
        make_recipe({"adapter": adapter})


@pytest.mark.parametrize(("name", "train"), [("full", "'*'"), ("bitfit", "biases"), ("norms", "norms")])
def test_what_is_no_method_of_its_own_says_how_it_is_written(name: str, train: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(f"method '{name}' is written method: none, train: {train}")):
        make_recipe({"adapter": {"method": name}})
