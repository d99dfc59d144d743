"""The run's folder: what may be written over, what a refusal leaves behind, and a disk that takes nothing.

A folder belongs to a run when its `events.jsonl` begins as one does. Whatever else lies in an output was put there by
somebody, so it is never replaced.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lorakit.errors import LorakitError, RecipeError, few

EVENTS, RECIPE, SUMMARY = "events.jsonl", "recipe.yaml", "run.json"
_BEGINNINGS = ('{"event": "start"', '{"event": "error"')


@contextmanager
def taken(output: Path, resume: bool, beside: Collection[str] = ()) -> Iterator[list[Path]]:
    """Claim a run's folder, make it, and hold it against other runs; give the folders that were not there before.

    Raises:
        RecipeError: as `claim`; another process is training there.
    """
    with ExitStack() as held:
        with writing(output):
            if output.exists() and not output.is_dir():
                raise RecipeError(f"the output {output} is a file; name a folder")
            made = make(output)
            held.enter_context(_alone(output))
            try:
                claim(output, resume, beside)
            except RecipeError:
                forget(made)
                raise
        yield made


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    from lorakit.persist.atomic import locked  # the command line reads names from here, and needs no tensors

    with locked(output) as mine:
        if not mine:
            raise RecipeError(
                f"another process is training in {output}; wait until it ends, stop it (Ctrl-C saves, and resume goes "
                "on), or name another output"
            )
        yield


def claim(output: Path, resume: bool, beside: Collection[str] = ()) -> None:
    """Refuse to write over a run or over foreign files, or to go on with none; a failed attempt's events are cleared.

    `beside` names what the caller itself has put there.

    Raises:
        RecipeError: what the folder holds, and what to do.
    """
    from lorakit.training.checkpoints import checkpoints

    saved = checkpoints(output)
    finished = (output / SUMMARY).exists() or (output / "adapter").exists()
    if resume:
        if not (saved or finished or _of_a_run(output / EVENTS)):
            raise RecipeError(f"there is no run in {output} to resume; check `output`, or start without resume")
        return
    if saved or finished:
        what = f"a run stopped at step {saved[-1].name.partition('-')[2]}" if saved else "a finished run"
        what = "a finished run" if (output / SUMMARY).exists() else what
        raise RecipeError(f"{output} holds {what}; resume it, name another output, or delete the folder")
    if not _of_a_run(output / EVENTS) and (foreign := _names(output) - set(beside)):
        raise RecipeError(
            f"the output {output} holds files that no run wrote ({few(sorted(foreign))}); "
            "name another output, or an empty folder"
        )
    (output / EVENTS).unlink(missing_ok=True)


def make(output: Path) -> list[Path]:
    """Make the folder and those above it, and return what was not there before, the deepest first."""
    missing = [folder for folder in (output, *output.parents) if not folder.exists()]
    output.mkdir(parents=True, exist_ok=True)
    return missing


def forget(made: list[Path]) -> None:
    """Take back the folders `make` made, with the few files of a run that was refused before its first step."""
    with suppress(OSError):
        for name in (EVENTS, RECIPE):
            for folder in made[:1]:
                (folder / name).unlink(missing_ok=True)
        for folder in made:
            folder.rmdir()


def write(file: Path, text: str) -> None:
    """Write a file in one step: the old one or the new, never half of it."""
    draft = file.with_name(f".{file.name}")
    with writing(file):
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, file)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn what the system says about a place that takes nothing into one line that names it.

    Raises:
        LorakitError: with the path and the system's reason.
    """
    try:
        yield
    except OSError as failed:
        raise LorakitError(f"{place} cannot be written: {failed.strerror or failed}") from failed


def _names(output: Path) -> set[str]:
    return {path.name for path in output.iterdir()} if output.is_dir() else set()


def _of_a_run(events: Path) -> bool:
    """Return whether the file begins as a run's does, even one that was cut in its first line."""
    if not events.is_file():
        return False
    with events.open(encoding="utf-8", errors="replace") as lines:
        text = lines.read(len(_BEGINNINGS[0]))
    return any(text and (text.startswith(begin) or begin.startswith(text)) for begin in _BEGINNINGS)
