"""`lorakit train`: run a recipe, show how it goes, and say what to do with the adapter that came out."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.screen import Screen, duration, peak, screen, size
from lorakit.errors import LorakitError, RecipeError, SpecError
from lorakit.training.folder import SUMMARY

if TYPE_CHECKING:
    from lorakit.training.recipe import Recipe
    from lorakit.training.run import Run


def train(
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file (docs/recipe.md).")],
    set: Annotated[
        list[str] | None, typer.Option("--set", help="Change a value: --set train.lr=1e-3; may be repeated.")
    ] = None,
    output: Annotated[str | None, typer.Option(help="Where to write, instead of the recipe's output.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the output.")] = False,
    nproc: Annotated[
        int, typer.Option(min=1, help="Processes to share the run, one a device (docs/many-devices.md).")
    ] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train an adapter from a recipe."""
    words = ["train", recipe, *(word for one in set or [] for word in ("--set", one)),
             *(["--output", output] if output else []), *(["--nproc", str(nproc)] if nproc > 1 else [])]  # fmt: skip
    if nproc > 1 and "WORLD_SIZE" not in os.environ:
        from lorakit.cli.launch import launch

        raise typer.Exit(launch([*words, *["--resume"] * resume, *["--json"] * json], nproc))
    with screen(json) as out:
        from lorakit.training import processes
        from lorakit.training.recipe import load_recipe

        changes = changes_of(set or [])
        if output is not None:
            changes["output"] = output
        made = load_recipe(recipe, changes)
        if resume:
            _refuse_elsewhere(Path(recipe), made)
        again = shlex.join(["lorakit", *words, "--resume"])
        finished = resume and (Path(made.output) / SUMMARY).exists()
        try:
            run = train_shown(made, out, resume=resume, hint=f"the run is saved; go on with: {again}")
        except SpecError as error:
            raise type(error)(f"{recipe}: adapter: {error}") from error
        if finished:
            out.say(f"{run.output} is already finished; nothing done")
        if processes.first():
            _summary(run, made, out)
        out.result(run.to_json())


def train_shown(recipe: Recipe, out: Screen, *, resume: bool, hint: str, beside: Collection[str] = ()) -> Run:
    """Train with the progress on the screen; Ctrl-C saves, and says the `hint` how to go on.

    `beside` names what the caller has put into the output.

    Raises:
        KeyboardInterrupt: stopped by the user, with the words for it.
        LorakitError: anything the user can repair.
    """
    from lorakit.cli.progress import Progress
    from lorakit.training.run import train as run_recipe

    with Progress(out) as progress:
        try:
            return run_recipe(recipe, resume=resume, listen=progress, beside=beside)
        except LorakitError as stopped:
            if progress.interrupted:
                raise KeyboardInterrupt(hint) from stopped
            raise
        except KeyboardInterrupt:
            from lorakit.training.checkpoints import checkpoints

            if checkpoints(recipe.output):
                raise KeyboardInterrupt(hint) from None
            raise


def _refuse_elsewhere(file: Path, recipe: Recipe) -> None:
    """Raise `RecipeError` where a run's own recipe is resumed from a directory its paths do not count from."""
    from lorakit.training.folder import EVENTS

    folder, output = file.resolve().parent, Path(recipe.output)
    if not (folder / EVENTS).is_file() or output.resolve() == folder or (output / EVENTS).is_file():
        return
    steps = output.parts
    root = Path(*folder.parts[: -len(steps)]) if folder.parts[-len(steps) :] == steps else None
    there = "; " if root is None else f": run it in {root}, or "
    raise RecipeError(
        f"{file} lies in a run's folder, and its output {output} would be {Path.cwd() / output} here. Paths in a "
        f"recipe count from the current directory{there}give --output {shlex.quote(str(folder))}"
    )


def changes_of(given: list[str]) -> dict[str, Any]:
    """Return the values that `--set key=value` flags mean, by their dotted keys."""
    from lorakit.training.recipe import scalar

    wrong = [text for text in given if "=" not in text]
    if wrong:
        raise RecipeError(f"--set takes key=value, such as --set train.lr=1e-3, not {', '.join(map(repr, wrong))}")
    changes = {}
    for text in given:
        key, _, value = text.partition("=")
        try:
            changes[key.strip()] = scalar(value)
        except RecipeError as error:
            raise RecipeError(f"--set {text}: the value {error}") from None
    return changes


def _summary(run: Run, recipe: Recipe, out: Screen) -> None:
    """Say what came out, and the next commands."""
    losses = f"training loss {run.train_loss:.4f}"
    if run.validation_loss is not None:
        losses += f", validation loss {run.validation_loss:.4f} (best, at step {run.best_step})"
    folder, merged = shlex.quote(str(run.output)), shlex.quote(f"{run.output}/merged")
    out.say(
        f"{run.steps:,} {'step' if run.steps == 1 else 'steps'} in {duration(run.seconds)}: {losses}",
        f"{run.tokens_per_second:,.0f} tokens/s in its steps, "
        f"{peak(run.device)} of memory {size(run.peak_memory_bytes)}",
        f"the adapter is in {run.adapter_dir} ({run.trainable_parameters:,} parameters trained)",
        "",
        "next:",
        f"  lorakit evaluate {folder}" + ("" if run.validation_loss is not None else " --data FILE"),
    )
    if run.task == "causal-lm":
        out.say(f'  lorakit generate {folder} --prompt "..."')
    from lorakit.cli.merge import flags_for
    from lorakit.core.method import Static

    method = recipe.adapter.build_method()
    if method is None or isinstance(method, Static):
        out.say(" ".join([f"  lorakit merge {folder}", *flags_for(recipe), f"--output {merged}"]))
