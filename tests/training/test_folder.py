"""The run's folder: what may be written over, what a refusal leaves behind, and a disk that takes nothing."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import LorakitError, RecipeError, TargetError
from lorakit.persist.atomic import locked
from lorakit.training import folder
from lorakit.training.run import Run, train
from tests.training.samples import recipe_of


def test_a_folder_of_the_user_s_own_files_is_left_alone(base: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "recipe.yaml").write_text("model: x  # my comment\n")
    with pytest.raises(RecipeError) as refused:
        train(recipe_of(base, tmp_path, output=str(mine)))
    assert str(refused.value) == (
        f"the output {mine} holds files that no run wrote (recipe.yaml); name another output, or an empty folder"
    )
    assert (mine / "recipe.yaml").read_text() == "model: x  # my comment\n"
    (mine / "events.jsonl").write_text('{"event": "concert", "date": "2024-05-01"}\n')
    with pytest.raises(RecipeError, match=r"holds files that no run wrote \(events\.jsonl, recipe\.yaml\)"):
        train(recipe_of(base, tmp_path, output=str(mine)))
    assert "concert" in (mine / "events.jsonl").read_text()


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_another_run_is_writing_is_left_alone(base: Path, tmp_path: Path, resume: bool) -> None:
    seen: list[str] = []

    def again(event: dict[str, Any]) -> None:
        if event["event"] == "step" and not seen:
            seen.append((tmp_path / "run" / "events.jsonl").read_text())
            with pytest.raises(RecipeError, match=f"another process is training in {tmp_path / 'run'}; wait"):
                train(recipe_of(base, tmp_path), resume=resume)
            assert (tmp_path / "run" / "events.jsonl").read_text() == seen[0]

    train(recipe_of(base, tmp_path), listen=again)
    assert seen


@pytest.mark.parametrize("there", [False, True])
def test_nothing_is_cleared_before_the_folder_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    place, real = tmp_path / "run", folder.claim
    if there:
        place.mkdir()

    def claimed(output: Path, *rest: Any) -> None:
        with locked(output) as free:
            assert not free
        real(output, *rest)

    monkeypatch.setattr(folder, "claim", claimed)
    with folder.taken(place, False) as made:
        assert made == ([] if there else [place])


def test_a_refusal_leaves_no_folder_that_it_made(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    with pytest.raises(RecipeError, match="there is no run in .* to resume"), folder.taken(place, True):
        raise AssertionError
    assert not (tmp_path / "a").exists()


def test_a_run_cut_short_before_its_first_checkpoint_is_replaced(base: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "plan":
            raise Killed

    recipe = recipe_of(base, tmp_path)
    with pytest.raises(Killed):
        train(recipe, listen=kill)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"recipe.yaml", "events.jsonl"}
    (tmp_path / "run" / "events.jsonl").write_text('{"event": "sta')  # the power went in the middle of a line
    train(recipe)
    assert (tmp_path / "run" / "events.jsonl").read_text().startswith('{"event": "start"')


def test_an_output_without_a_name_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="output: must name a folder"):
        recipe_of(base, tmp_path, output="")


def test_a_refused_recipe_leaves_no_folder_behind(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "runs" / "deep" / "first"
    with pytest.raises(TargetError, match="q_prj"):
        train(recipe_of(base, tmp_path, adapter__targets=["q_prj"], output=str(output)))
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs").mkdir()
    with pytest.raises(TargetError, match="q_prj"):
        train(recipe_of(base, tmp_path, adapter__targets=["q_prj"], output=str(output)))
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("place", ["file/run", "/proc/self/run"])
def test_an_output_that_cannot_be_made_is_named_with_the_reason(base: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    reason = "Not a directory" if place == "file/run" else "No such file or directory"
    with pytest.raises(LorakitError, match=f"^{tmp_path / place} cannot be written: {reason}$"):
        train(recipe_of(base, tmp_path, output=str(tmp_path / place)))


@pytest.mark.parametrize("full", ["events.jsonl", ".recipe.yaml", ".run.json"])
def test_a_full_disk_is_told_with_the_file(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    real = Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if self.name == full and mode in ("a", "w"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    named = tmp_path / "run" / full.removeprefix(".")
    with pytest.raises(LorakitError, match=f"^{named} cannot be written: No space left on device$"):
        train(recipe_of(base, tmp_path))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"output": "x", "st', "Unterminated string starting at line 1 column 17"),
        ("", "Expecting value at line 1 column 1"),
        ("[" * 100_000, "brackets nested too deeply"),
        ('{"steps": ' + "9" * 5000 + "}", "an integer of more than 4,300 digits"),
        ('{"steps": 3}', r"it is not a run's summary \('labels'\)"),
        (None, "Is a directory"),
    ],
)
def test_a_damaged_summary_says_what_to_do(tmp_path: Path, text: str | None, reason: str) -> None:
    file = tmp_path / "run.json"
    file.mkdir() if text is None else file.write_text(text)
    with pytest.raises(RecipeError) as refused:
        Run.read(tmp_path)
    assert re.fullmatch(
        f"{file} cannot be read: {reason}; delete it and resume, and the run writes it again", str(refused.value)
    )


def test_a_run_whose_summary_is_damaged_is_finished_again(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(base, tmp_path)
    run = train(recipe)
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(RecipeError, match="delete it and resume"):
        train(recipe, resume=True)
    (tmp_path / "run" / "run.json").unlink()
    shutil.rmtree(tmp_path / "run" / "adapter")
    assert train(recipe, resume=True).train_loss == run.train_loss
