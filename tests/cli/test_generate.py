"""`lorakit generate`: prompts are rendered as in training, whoever the adapter came from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.cli.conftest import answer, invoke


def test_a_run_answers_a_prompt_as_training_would_have_shown_it(run: Path, base: Path) -> None:
    said = answer("generate", run, "--prompt", "a cab =", "--max-new-tokens", 4)
    assert said["answers"][0]["prompt"] == "a cab ="
    assert said["base"] == str(base)
    assert isinstance(said["answers"][0]["answer"], str)


def test_prompts_come_from_a_file_in_the_format_of_the_training_data(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("a =", "bed =")))
    said = answer("generate", run, "--prompts", file, "--max-new-tokens", 3)
    assert [a["prompt"] for a in said["answers"]] == ["a =", "bed ="]


def test_a_separator_that_training_put_is_put_again(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    recipe = copy / "recipe.yaml"
    assert "separator: ''" in recipe.read_text()
    recipe.write_text(recipe.read_text().replace("separator: ''", "separator: ' #'"))
    said = answer("generate", copy, "--prompt", "a", "--max-new-tokens", 1)
    assert said["answers"][0]["prompt"] == "a #"


def test_the_adapter_inside_a_run_remembers_the_recipe_too(run: Path) -> None:
    one, other = (answer("generate", place, "--prompt", "a cab =", "--max-new-tokens", 4) for place in
                  (run, run / "adapter"))  # fmt: skip
    assert one["answers"] == other["answers"]


def test_an_adapter_taken_out_of_its_run_answers_the_same(run: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "a cab ="}) + "\n")
    shutil.copytree(run / "adapter", tmp_path / "mine")
    one, other = (answer("generate", place, "--prompts", prompts, "--max-new-tokens", 4) for place in
                  (run, tmp_path / "mine"))  # fmt: skip
    assert one["answers"] == other["answers"]


def test_the_adapter_changes_what_the_base_says_and_a_seed_repeats_it(run: Path, base: Path) -> None:
    draw = ("--prompt", "bead cafe =", "--max-new-tokens", 24, "--temperature", 1.0)
    adapted = [answer("generate", run, *draw, "--seed", seed)["answers"] for seed in (1, 1, 2)]
    assert adapted[0] == adapted[1] != adapted[2]
    assert answer("generate", base, *draw, "--seed", 1)["answers"] != adapted[0]


def test_without_json_only_the_answers_are_on_standard_output(base: Path) -> None:
    result = invoke("generate", base, "--prompt", "a", "--prompt", "b", "--max-new-tokens", 2)
    assert result.exit_code == 0
    assert result.stdout.count("\n") >= 2
    assert result.stderr == ""


def test_prompt_and_prompts_exclude_each_other(base: Path) -> None:
    for arguments in ((), ("--prompt", "a", "--prompts", "b.jsonl")):
        result = invoke("generate", base, *arguments)
        assert (result.exit_code, result.stderr) == (
            2, "error: give --prompt TEXT or --prompts FILE.jsonl, one of the two\n",
        )  # fmt: skip


def test_an_unknown_format_names_the_near_one(base: Path) -> None:
    result = invoke("generate", base, "--prompt", "a", "--format", "mesages")
    assert result.exit_code == 2
    assert "unknown format 'mesages'; did you mean 'messages'?" in result.stderr


def test_a_prompt_too_long_for_the_model_says_by_how_much(base: Path) -> None:
    result = invoke("generate", base, "--prompt", "abc " * 60)
    assert result.exit_code == 2
    assert "exceed the model's 128 positions" in result.stderr


def test_a_prompt_that_cannot_be_read_is_named_with_its_file_and_line(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a ="}\n\n{"promt": "b"}\n{"prompt": null}\n')
    result = invoke("generate", run, "--prompts", file)
    assert result.exit_code == 2
    assert result.stderr == (
        "error: prompts that cannot be read as prompt+completion:\n"
        f"  - {file} line 3: field 'prompt' is missing or null, expected a string; found 'prompt', 'promt'\n"
        f"  - {file} line 4: field 'prompt' is missing or null, expected a string; found 'prompt', 'promt'\n"
    )
    file.write_text('{"prompt": 5}\n')
    assert (
        f"{file} line 1: field 'prompt' is a number, expected a string"
        in invoke("generate", run, "--prompts", file).stderr
    )


def test_an_empty_prompt_is_counted_from_one(run: Path) -> None:
    result = invoke("generate", run, "--prompt", "a =", "--prompt", "")
    assert (result.exit_code, result.stderr) == (
        2, "error: prompt 2 is empty, and a model needs something to go on from; write at least one word\n",
    )  # fmt: skip


def test_a_format_that_contradicts_the_adapter_is_refused(run: Path) -> None:
    result = invoke("generate", run, "--prompt", "a", "--format", "messages")
    assert (result.exit_code, result.stderr) == (
        2, f"error: {run} was trained on rows of the format prompt+completion, not messages; leave --format out\n",
    )  # fmt: skip
    assert (
        invoke("generate", run, "--prompt", "a", "--format", "prompt+completion", "--max-new-tokens", 1).exit_code == 0
    )


def test_the_help_names_every_format_that_can_be_answered() -> None:
    from lorakit.data import FORMATS

    said = " ".join(invoke("generate", "--help").stdout.split())
    assert all(name in said for name in FORMATS.keys() - {"classification"})


def test_a_file_of_an_adapter_sends_to_its_folder(run: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        result = invoke("generate", run / "adapter" / name, "--prompt", "a")
        assert (result.exit_code, result.stderr) == (
            2, f"error: {run / 'adapter' / name} is one file of an adapter; give its folder, {run / 'adapter'}\n",
        )  # fmt: skip
