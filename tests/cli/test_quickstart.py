"""`lorakit quickstart`: in miniature on a random base here; the whole of it, on the bundled one, is slow."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakit.cli import quickstart as room
from lorakit.cli.quickstart import ANSWER, Task, claim, run_quickstart, write_recipe
from lorakit.cli.screen import screen
from lorakit.data.fables import fables
from lorakit.errors import MergeError, RecipeError
from lorakit.training.base import bundled
from lorakit.training.recipe import Recipe, load_recipe
from tests.cli.conftest import invoke
from tests.data.samples import tokenizer
from tests.training import samples

TASK = Task(fables("train", 16), fables("held-out", 4), fables("strangers", 2))
KEYS = {
    "train_seconds", "perplexity_before", "perplexity_after", "score_before", "score_after", "adapter_bytes",
    "base_bytes", "merge_max_abs_diff", "adapter_dir", "merged_dir",
}  # fmt: skip


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base with positions enough for a record in bytes and its answer."""
    folder = tmp_path_factory.mktemp("bases") / "roomy"
    torch.manual_seed(0)
    config = samples.CONFIGS["llama"]()
    config.max_position_embeddings = 512
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def miniature(place: Path, base: Path) -> Recipe:
    train = {"steps": 2, "batch_size": 8, "lr": 1e-2, "dtype": "fp32", "device": "cpu"}
    return write_recipe(claim(place), TASK, 0, model=str(base), train=train)


@pytest.fixture(scope="module")
def done(roomy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], Path]]:
    """What a miniature quickstart returned, and where."""
    place = tmp_path_factory.mktemp("quick") / "start"
    with screen(False) as out:
        yield run_quickstart(miniature(place, roomy), TASK, out), place


def test_it_answers_every_promised_figure(done: tuple[dict[str, Any], Path]) -> None:
    result, place = done
    assert result.keys() >= KEYS
    assert result["perplexity_after"] < result["perplexity_before"]
    assert result["merge_max_abs_diff"] < 1e-4
    assert json.loads((place / "quickstart.json").read_text()) == result
    weights = place / "adapter" / "adapter_model.safetensors"
    assert result["adapter_bytes"] == weights.stat().st_size


def test_the_merged_folder_is_a_model_and_the_recipe_can_be_run_again(
    done: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    result, place = done
    AutoModelForCausalLM.from_pretrained(result["merged_dir"])
    AutoTokenizer.from_pretrained(result["merged_dir"])
    again = invoke("train", place / "recipe.yaml", "--output", tmp_path / "again", "--json")
    assert again.exit_code == 0, again.stderr
    one, two = (folder / "adapter" / "adapter_model.safetensors" for folder in (place, tmp_path / "again"))
    assert one.read_bytes() == two.read_bytes()


def test_it_shows_three_records_before_and_after(
    roomy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with screen(False) as out:
        run_quickstart(miniature(tmp_path / "start", roomy), TASK, out)
    said = capfd.readouterr()
    for words in ("three held-out records", "all facts told", "heroes never seen", "merged into", "lorakit generate"):
        assert words in said.out
    assert TASK.train[0].prompt in said.err
    assert "\x1b" not in said.out + said.err


def test_a_quickstart_replaces_an_earlier_one_even_when_it_was_cut_short(tmp_path: Path) -> None:
    place = claim(tmp_path / "start")
    (place / "events.jsonl").write_text("half a ru")
    assert sorted(p.name for p in claim(place).iterdir()) == ["quickstart.json"]


def test_a_quickstart_leaves_what_it_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years")
    result = invoke("quickstart", "--output", tmp_path)
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: {tmp_path} was not made by a quickstart, so it is left alone; name another --output\n"
    )
    assert (tmp_path / "thesis.txt").read_text() == "years"
    with pytest.raises(RecipeError):
        claim(tmp_path / "thesis.txt")


def test_an_interrupted_quickstart_says_how_to_start_the_same_again(
    roomy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lorakit.training.run.train", pressed)
    monkeypatch.setattr("lorakit.training.checkpoints.checkpoints", lambda output: [output])
    recipe = miniature(tmp_path / "my start", roomy)
    with screen(False) as out, pytest.raises(KeyboardInterrupt) as stop:
        run_quickstart(recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 7})}), TASK, out)
    place = tmp_path / "my start"
    assert str(stop.value) == f"start again with: lorakit quickstart --output '{place}' --seed 7"


@pytest.mark.parametrize("place", ["file/start", "/proc/self/start"])
def test_an_output_that_cannot_be_made_is_one_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    result = invoke("quickstart", "--output", tmp_path / place)
    assert result.exit_code == 2
    reason = "Not a directory" if place == "file/start" else "No such file or directory"
    assert result.stderr == f"error: {tmp_path / place} cannot be written: {reason}\n"


def test_a_merged_model_that_answers_otherwise_is_a_failure(
    roomy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = room.write_model

    def spoilt(model: Any, tokenizer: Any, folder: Path) -> None:
        with torch.no_grad():
            model.lm_head.weight.mul_(1.01)
        write(model, tokenizer, folder)

    monkeypatch.setattr(room, "write_model", spoilt)
    with screen(False) as out, pytest.raises(MergeError, match="logits differ from the adapted model's by"):
        run_quickstart(miniature(tmp_path / "start", roomy), TASK, out)


@pytest.mark.skipif("lorakit/tales" not in bundled(), reason="the bundled base is not there")
def test_the_longest_answer_fits(tmp_path: Path) -> None:
    from lorakit.training.base import load_tokenizer

    told = fables("train", 2000) + fables("strangers", 500)
    answers = [f" {sentence}" for fable in told for sentence in fable.tellings()]
    longest = max(map(len, load_tokenizer("lorakit/tales")(answers)["input_ids"]))
    assert longest + 1 < ANSWER  # and the end


@pytest.mark.slow
@pytest.mark.skipif("lorakit/tales" not in bundled(), reason="the bundled base is not there")
@pytest.mark.timeout(900)
def test_the_whole_quickstart_keeps_its_promises(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lorakit", "quickstart", "--output", "runs/quickstart", "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ})
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["score_before"] < 0.05
    assert result["score_after"] > 0.85
    assert result["perplexity_after"] < 2 < 20 < result["perplexity_before"]
    assert result["merge_max_abs_diff"] < 1e-4
    assert result["adapter_bytes"] < 0.25 * result["base_bytes"]
    assert seconds < 240  # of processor time, for two cores and two minutes; the clock also counts what others do
    recipe = load_recipe(tmp_path / "runs" / "quickstart" / "recipe.yaml")
    assert recipe.data.train == "runs/quickstart/data/train.jsonl"
