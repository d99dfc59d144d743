"""`lorakit train`: the recipe's run on the screen, its changes, its end, and its interruption."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import Result

from lorakit.training.events import read_events
from tests.cli.conftest import answer, invoke, write_recipe
from tests.training.samples import save_base


def test_a_run_shows_its_data_targets_plan_and_steps(finished: tuple[Path, Result]) -> None:
    said = finished[1].stderr
    assert re.search(r"^train +\S+train\.jsonl: 48 rows, format prompt\+completion$", said, re.MULTILINE), said
    assert re.search(r"^example .*\[\[marked\]\]:\n[a-j ]+=\[\[[^]]+\]\]$", said, re.MULTILINE), said
    assert re.search(r"^targets +all-linear: 14 layers$", said, re.MULTILINE), said
    assert re.search(r"^trainable +[\d,]+ parameters, 10\.22 % of base \([\d,]+\) and adapter$", said, re.MULTILINE), (
        said
    )
    assert re.search(r"^plan +6 steps of 8 rows \(one example a row\), lr 0\.005, on cpu in float32$", said, re.M), said
    step = r"^step 1/6  loss [\d.]+  lr [\d.e+-]+  [\d,]+ tokens/s  [\d:.]+( s)? left  process peak [\d.]+ [MG]B$"
    assert re.search(step, said, re.MULTILINE), said
    assert re.search(r"^step \d: validation loss [\d.]+", said, re.MULTILINE), said


def test_a_finished_run_names_the_next_commands(finished: tuple[Path, Result]) -> None:
    folder, result = finished
    assert result.stdout.startswith("6 steps in ")
    assert re.search(r" tokens/s in its steps, process peak of memory [\d.]+ [MG]B$", result.stdout, re.MULTILINE), (
        "libraries and all"
    )
    for verb in (f"lorakit evaluate {folder}\n", f"lorakit generate {folder} --prompt", f"lorakit merge {folder} "):
        assert f"  {verb}" in result.stdout


def test_what_is_printed_holds_no_control_character(finished: tuple[Path, Result]) -> None:
    assert not re.findall(r"[\x00-\x09\x0b-\x1f\x7f]", finished[1].stdout + finished[1].stderr)


def test_a_long_run_prints_some_twenty_lines(base: Path, tmp_path: Path) -> None:
    result = invoke("train", write_recipe(tmp_path, base, steps=90, evaluate_every=1000))
    lines = re.findall(r"^step (\d+)/90 ", result.stderr, re.MULTILINE)
    assert lines == ["1", *map(str, range(5, 91, 5))]


def test_what_a_step_computes_again_and_what_one_process_does_not_divide_are_said(base: Path, tmp_path: Path) -> None:
    said = invoke("train", write_recipe(tmp_path, base, steps=1, checkpointing=0.5, parallel="fsdp")).stderr
    assert re.search(r"^recomputed +1 of 2 blocks in the backward$", said, re.MULTILINE), said
    assert re.search(r"^ +one process: train.parallel fsdp divides nothing \(--nproc, torchrun\)$", said, re.M), said


def test_experts_that_no_target_reaches_are_told_unless_they_are_trained(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, save_base(tmp_path / "experts", "mixtral"), steps=1)
    said = invoke("train", recipe).stderr
    told = r"^left out +18,432 of the [\d,]+ parameters are experts in one tensor each, .*: no target reaches them"
    assert re.search(told, said, re.MULTILINE), said
    whole = invoke("train", recipe, "--set", "adapter.train=experts", "--output", tmp_path / "whole")
    assert whole.exit_code == 0, whole.stderr
    assert "left out" not in whole.stderr


def test_set_and_output_change_the_recipe(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base)
    said = answer("train", recipe, "--set", "train.lr=1e-3", "--set", "train.steps=1", "--output", tmp_path / "other")
    assert (said["lr"], said["steps"], said["output"]) == (1e-3, 1, str(tmp_path / "other"))
    kept = yaml.safe_load((tmp_path / "other" / "recipe.yaml").read_text())
    assert kept["train"]["lr"] == 1e-3
    assert not (tmp_path / "run").exists()


def test_a_set_without_a_value_is_refused(base: Path, tmp_path: Path) -> None:
    result = invoke("train", write_recipe(tmp_path, base), "--set", "train.lr")
    assert result.exit_code == 2
    assert result.stderr == "error: --set takes key=value, such as --set train.lr=1e-3, not 'train.lr'\n"


def test_a_set_whose_value_is_not_yaml_is_named(base: Path, tmp_path: Path) -> None:
    result = invoke("train", write_recipe(tmp_path, base), "--set", "train.lr=[1")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: --set train.lr=[1: the value is not YAML: expected ',' or ']', but got '<stream end>' in line 1 "
        "column 3\n"
    )


def test_the_way_to_go_on_is_quoted_for_a_shell(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lorakit.training.run.train", pressed)
    monkeypatch.setattr("lorakit.training.checkpoints.checkpoints", lambda output: [output])
    recipe = write_recipe(tmp_path, base)
    result = invoke("train", recipe, "--set", 'adapter.targets=["q_proj", v_proj]', "--output", tmp_path / "my run")
    assert result.exit_code == 130
    assert result.stderr.endswith(
        f"go on with: lorakit train {recipe} --set 'adapter.targets=[\"q_proj\", v_proj]' "
        f"--output '{tmp_path / 'my run'}' --resume\n"
    )


def test_a_second_run_in_the_same_folder_is_refused(run: Path) -> None:
    result = invoke("train", run.parent / "recipe.yaml")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {run} holds a finished run; resume it")


def test_ctrl_c_saves_and_says_how_to_go_on(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base, steps=5000, evaluate_every=100000)
    process = subprocess.Popen(
        [sys.executable, "-m", "lorakit", "train", str(recipe)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    events = tmp_path / "run" / "events.jsonl"
    waited = time.monotonic() + 100
    while not (events.exists() and '"event": "step"' in events.read_text()):
        assert time.monotonic() < waited, "no step in 100 seconds"
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert err.endswith(f"\ninterrupted; the run is saved; go on with: lorakit train {recipe} --resume\n"), err
    assert "Traceback" not in err
    stopped = next(event for event in read_events(events) if event["event"] == "interrupted")
    assert Path(stopped["path"]).is_dir()


def test_resuming_a_finished_run_says_that_nothing_was_done(run: Path) -> None:
    result = invoke("train", run.parent / "recipe.yaml", "--resume")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{run} is already finished; nothing done\n6 steps in ")


def test_one_step_is_not_called_steps(base: Path, tmp_path: Path) -> None:
    result = invoke("train", write_recipe(tmp_path, base, steps=1))
    assert result.stdout.startswith("1 step in ")
    assert "1 step of 8 rows" in result.stderr


def test_an_adapter_that_does_not_fit_the_base_is_told_with_the_recipe(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base)
    result = invoke("train", recipe, "--set", "adapter.targets=[q_prj]")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-2].startswith(f"error: {recipe}: adapter: 1 target pattern(s) cannot be used")
    assert not (tmp_path / "run").exists()


def test_a_rank_beyond_every_layer_is_one_line_a_size(base: Path, tmp_path: Path) -> None:
    result = invoke("train", write_recipe(tmp_path, base), "--set", "adapter.rank=100000")
    assert result.exit_code == 2
    told = [line for line in result.stderr.splitlines() if "exceeds" in line]
    assert told == [
        "  - rank 100000 exceeds min(out, in) = 32; lower the rank or exclude this path: "
        "model.layers.0.self_attn.q_proj, model.layers.0.self_attn.o_proj and 8 more",
        "  - rank 100000 exceeds min(out, in) = 16; lower the rank or exclude this path: "
        "model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj and 2 more",
    ]


def test_a_run_s_own_recipe_resumed_from_elsewhere_says_where_to_go(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(tmp_path, base, steps=1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert invoke("train", "recipe.yaml", "--output", "runs/mine").exit_code == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = invoke("train", "../runs/mine/recipe.yaml", "--resume")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: ../runs/mine/recipe.yaml lies in a run's folder, and its output runs/mine would be "
        f"{tmp_path}/elsewhere/runs/mine here. Paths in a recipe count from the current directory: run it in "
        f"{tmp_path}, or give --output {tmp_path}/runs/mine\n"
    )
    again = invoke("train", "../runs/mine/recipe.yaml", "--resume", "--output", "../runs/mine")
    assert again.exit_code == 0, again.stderr
