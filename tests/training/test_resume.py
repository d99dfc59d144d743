"""A resumed run equals one that was never stopped, bit for bit, however it was stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.errors import AdapterFileError, LorakitError, RecipeError
from lorakit.persist.native import load_native
from lorakit.training import checkpoints as module
from lorakit.training import processes
from lorakit.training.checkpoints import checkpoints
from lorakit.training.events import Event, read_events
from lorakit.training.recipe import Recipe
from lorakit.training.run import Run, train
from tests.training.samples import pairs, recipe_of, write_rows


def demanding(base: Path, folder: Path, **changes: Any) -> Recipe:
    """A recipe with everything a resume can get wrong: dropout, epochs that end mid-run, accumulation, validation."""
    folder.mkdir(exist_ok=True)
    validation = write_rows(folder / "valid.jsonl", pairs(10, 200))
    return recipe_of(
        base,
        folder,
        **{
            "data__validation": validation,
            "adapter__dropout": 0.1,
            "train__epochs": 3,
            "train__batch_size": 5,
            "train__accumulation": 2,
            "train__save_every": 2,
            "train__evaluate_every": 3,
            **changes,
        },
    )


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[Event]]:
    """The run that was never stopped: 15 steps, 5 an epoch."""
    folder = tmp_path_factory.mktemp("whole")
    run = train(demanding(base, folder))
    return run, read_events(folder / "run" / "events.jsonl")


class Stopped(Exception):
    """Stands for a crash."""


def stop_at(step: int) -> Any:
    def listen(event: Event) -> None:
        if event["event"] == "step" and event["step"] == step:
            raise Stopped

    return listen


def assert_same_run(run: Run, folder: Path, whole: tuple[Run, list[Event]]) -> None:
    expected, events = whole
    ours, theirs = (Path(each.adapter_dir, "adapter_model.safetensors").read_bytes() for each in (run, expected))
    assert ours == theirs
    for key in ("steps", "train_loss", "validation_loss", "best_step", "tokens", "trained_tokens"):
        assert getattr(run, key) == getattr(expected, key), key
    told = {e["step"]: e["loss"] for e in read_events(folder / "run" / "events.jsonl") if e["event"] == "step"}
    assert told == {e["step"]: e["loss"] for e in events if e["event"] == "step"}


@pytest.mark.parametrize("step", [3, 5, 8])  # mid-epoch, after the last step of an epoch, second epoch
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    base: Path, tmp_path: Path, whole: tuple[Run, list[Event]], step: int
) -> None:
    recipe = demanding(base, tmp_path)
    with pytest.raises(Stopped):
        train(recipe, listen=stop_at(step))
    torch.rand(7)  # another sitting finds another random state
    assert_same_run(train(recipe, resume=True), tmp_path, whole)


def test_a_run_stopped_before_its_first_checkpoint_starts_again(
    base: Path, tmp_path: Path, whole: tuple[Run, list[Event]]
) -> None:
    recipe = demanding(base, tmp_path)
    with pytest.raises(Stopped):
        train(recipe, listen=stop_at(1))
    assert_same_run(train(recipe, resume=True), tmp_path, whole)


KILLED = """
import os, signal, sys, torch
from lorakit import load_recipe, train

file, where = sys.argv[1:]
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
if where == "save":
    real, calls = torch.save, []
    def save(*args, **kwargs):
        calls.append(args)
        real(*args, **kwargs)
        if len(calls) == 8:  # three files a checkpoint: the third checkpoint has its optimizer, but no random state
            die()
    torch.save = save
train(load_recipe(file), listen=lambda e: die() if (where, e["event"], e["step"]) == ("run", "step", 7) else None)
"""


@pytest.mark.parametrize("where", ["run", "save"])
def test_a_run_killed_at_once_goes_on_from_its_last_whole_checkpoint(
    base: Path, tmp_path: Path, whole: tuple[Run, list[Event]], where: str
) -> None:
    recipe = demanding(base, tmp_path)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "recipe.yaml"), where], capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    saved = checkpoints(tmp_path / "run")
    assert saved
    if where == "save":
        assert [p.name for p in (tmp_path / "run").glob(".checkpoint-*")], "the half-written folder is there, hidden"
    assert_same_run(train(recipe, resume=True), tmp_path, whole)


def test_a_folder_that_lacks_a_file_is_no_checkpoint(base: Path, tmp_path: Path) -> None:
    recipe = demanding(base, tmp_path)
    with pytest.raises(Stopped):
        train(recipe, listen=stop_at(5))
    last = checkpoints(tmp_path / "run")[-1]
    (last / "trainer_state.json").unlink()
    assert last not in checkpoints(tmp_path / "run")


def test_resuming_refuses_a_silently_changed_recipe(base: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(demanding(base, tmp_path), listen=stop_at(5))
    changed = demanding(base, tmp_path, train__lr=1e-3, adapter__alpha=64)
    with pytest.raises(RecipeError) as refused:
        train(changed, resume=True)
    assert "adapter.alpha: 8 -> 64" in str(refused.value)
    assert "train.lr: 0.005 -> 0.001" in str(refused.value)
    assert "another output" in str(refused.value)
    with pytest.raises(RecipeError, match=r"train.epochs: 3.0 -> 4.0") as longer:
        train(demanding(base, tmp_path, train__epochs=4), resume=True)
    assert "a longer run has another schedule" in str(longer.value)


def test_resuming_refuses_changed_data(base: Path, tmp_path: Path) -> None:
    recipe = demanding(base, tmp_path)
    with pytest.raises(Stopped):
        train(recipe, listen=stop_at(5))
    write_rows(tmp_path / "train.jsonl", pairs(47))
    with pytest.raises(RecipeError, match="made with other training data"):
        train(recipe, resume=True)


def test_the_folder_may_move_before_a_resume(base: Path, tmp_path: Path, whole: tuple[Run, list[Event]]) -> None:
    with pytest.raises(Stopped):
        train(demanding(base, tmp_path), listen=stop_at(7))
    shutil.move(tmp_path / "run", tmp_path / "moved")
    recipe = demanding(base, tmp_path, output=str(tmp_path / "moved"))
    run = train(recipe, resume=True)
    assert run.validation_loss == whole[0].validation_loss
    assert run.train_loss == whole[0].train_loss


def test_resuming_a_finished_run_returns_it(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(base, tmp_path)
    run = train(recipe)
    before = (tmp_path / "run" / "events.jsonl").read_bytes()
    assert train(recipe, resume=True) == run
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == before
    with pytest.raises(RecipeError, match=r"train.lr: 0.005 -> 0.001"):
        train(recipe_of(base, tmp_path, train__lr=1e-3), resume=True)


def test_resuming_nothing_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no run in .* to resume"):
        train(recipe_of(base, tmp_path), resume=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_ctrl_c_saves_at_the_next_step_and_says_how_to_go_on(
    base: Path, tmp_path: Path, whole: tuple[Run, list[Event]], number: signal.Signals
) -> None:
    recipe = demanding(base, tmp_path)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a shell in the background ignores it
    before = signal.getsignal(number)

    def press(event: Event) -> None:
        if event["event"] == "step" and event["step"] == 7:
            signal.raise_signal(number)

    with pytest.raises(LorakitError, match="stopped at step 8 of 15, and saved; to go on, .* resume"):
        train(recipe, listen=press)
    assert signal.getsignal(number) is before
    assert checkpoints(tmp_path / "run")[-1].name == "checkpoint-8"
    told = [event["event"] for event in read_events(tmp_path / "run" / "events.jsonl")]
    assert told[-1] == "interrupted"
    assert "error" not in told
    assert_same_run(train(recipe, resume=True), tmp_path, whole)


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[Run, list[Event]]
) -> None:
    recipe = demanding(base, tmp_path)
    real, calls = torch.save, []

    def full(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) > 4:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 22")
        real(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        AdapterFileError,
        match=r"checkpoint-3: could not save: No space left on device; earlier checkpoints are intact$",
    ):
        train(recipe)
    monkeypatch.undo()
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert read_events(tmp_path / "run" / "events.jsonl")[-1]["event"] == "error"
    assert_same_run(train(recipe, resume=True), tmp_path, whole)


def test_a_full_disk_at_the_first_checkpoint_promises_no_earlier_one(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 22")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(AdapterFileError, match=r"checkpoint-2: could not save: No space left on device$"):
        train(demanding(base, tmp_path))


@pytest.mark.parametrize(
    "name", ["adapter.lorakit.safetensors", "optimizer.pt", "trainer_state.json", "checkpoint.json"]
)
def test_a_checkpoint_that_is_cut_off_says_what_to_delete(base: Path, tmp_path: Path, name: str) -> None:
    recipe = demanding(base, tmp_path)
    with pytest.raises(Stopped):
        train(recipe, listen=stop_at(5))
    older, newest = checkpoints(tmp_path / "run")
    file = newest / name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(RecipeError) as refused:
        train(recipe, resume=True)
    assert str(file) in str(refused.value)
    assert str(refused.value).endswith(f"; delete {newest} to go on from {older.name}")
    shutil.copyfile(file, older / name)
    with pytest.raises(RecipeError, match=f"delete {newest} and {older} to start from the beginning$"):
        train(recipe, resume=True)
    shutil.rmtree(older)
    with pytest.raises(RecipeError, match=f"delete {newest} to start from the beginning$"):
        train(recipe, resume=True)


@pytest.mark.parametrize(
    "name", ["adapter.lorakit.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "checkpoint.json"]
)
def test_a_checkpoint_with_another_bit_is_not_gone_on_with(base: Path, tmp_path: Path, name: str) -> None:
    recipe = demanding(base, tmp_path)
    with pytest.raises(Stopped):
        train(recipe, listen=stop_at(5))
    file = checkpoints(tmp_path / "run")[-1] / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(RecipeError, match=rf"{name}.*; delete .* to go on from"):
        train(recipe, resume=True)


def test_a_checkpoint_that_cannot_be_read_is_named_with_the_one_before(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = demanding(base, tmp_path)
    with pytest.raises(Stopped):
        train(recipe, listen=stop_at(5))
    older, newest = checkpoints(tmp_path / "run")
    real = module.sha256

    def failing(file: Path) -> str:
        if file == newest / "optimizer.pt":
            raise AdapterFileError(f"{file} could not be read: Input/output error")
        return real(file)

    monkeypatch.setattr(module, "sha256", failing)
    with pytest.raises(RecipeError) as refused:
        train(recipe, resume=True)
    asked = f"delete {newest} to go on from {older.name}"
    assert str(refused.value) == f"{newest / 'optimizer.pt'} could not be read: Input/output error; {asked}"


def test_a_checkpoint_without_checksums_is_of_another_version(base: Path, tmp_path: Path) -> None:
    recipe = demanding(base, tmp_path)
    with pytest.raises(Stopped):
        train(recipe, listen=stop_at(5))
    memory = checkpoints(tmp_path / "run")[-1] / "checkpoint.json"
    memory.write_text(json.dumps({k: v for k, v in json.loads(memory.read_text()).items() if k != "files"}))
    with pytest.raises(RecipeError, match=r"checkpoint.json is damaged or of another version; delete .* to go on from"):
        train(recipe, resume=True)


def test_processes_whose_launcher_is_gone_save_and_stop(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIT_LAUNCHER", str(os.getppid()))
    assert not processes.orphaned()
    monkeypatch.setenv("LORAKIT_LAUNCHER", str(os.getppid() + 1))
    with pytest.raises(LorakitError, match="stopped at step 1 of .*, and saved"):
        train(recipe_of(base, tmp_path))
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-1"]


def test_a_checkpoint_holds_the_adapter_alone_and_its_recipe(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(base, tmp_path)
    train(recipe)
    last = checkpoints(tmp_path / "run")[-1]
    assert sum(u.tensors["down"].numel() + u.tensors["up"].numel() for u in load_native(last).updates) == 3712
    assert not [p.name for p in last.iterdir() if p.name.startswith(("model", "pytorch_model", "training_args"))]
    memory = json.loads((last / "checkpoint.json").read_text())
    assert memory["recipe"]["train"]["lr"] == 5e-3
    assert torch.__version__.startswith(memory["versions"]["torch"].partition("+")[0])


def test_old_checkpoints_go_and_the_best_one_stays(base: Path, tmp_path: Path) -> None:
    strange = write_rows(tmp_path / "strange.jsonl", [{"prompt": "a cab =", "completion": " QXZQXZQXZ"}])
    recipe = demanding(base, tmp_path, train__keep=1, train__lr=0.05, train__evaluate_every=1, data__validation=strange)
    run = train(recipe)
    assert run.best_step is not None
    assert run.best_step < run.steps, "the loss must turn"
    kept = {path.name for path in checkpoints(tmp_path / "run")}
    assert kept == {f"checkpoint-{run.best_step}", f"checkpoint-{run.steps}"}


def test_a_resume_under_other_versions_says_so(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, now = module._versions, module._versions(demanding(base, tmp_path))["torch"]
    monkeypatch.setattr(module, "_versions", lambda recipe: {**real(recipe), "torch": "1.0"})
    with pytest.raises(Stopped):
        train(demanding(base, tmp_path), listen=stop_at(8))
    monkeypatch.undo()
    with pytest.raises(Stopped):
        train(demanding(base, tmp_path), resume=True, listen=stop_at(10))
    starts = [e for e in read_events(tmp_path / "run" / "events.jsonl") if e["event"] == "start"]
    assert [start["versions_changed"] for start in starts] == [{}, {"torch": ["1.0", now]}]
