"""Where words go: results to standard output, progress to standard error, and with --json exactly one object.

Under --json everything a verb or a library prints is led to standard error, so standard output holds the object and
nothing else, whatever happens: `{"error": {"kind", "message"}}` when the user's input cannot work. A pipe gets plain
lines without control characters.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import LorakitError
from lorakit.errors import few as few
from lorakit.report.words import duration as duration  # the words of pages and of the terminal are one
from lorakit.report.words import size as size
from lorakit.report.words import span as span

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

WIDTH = 100  # of tables where there is no terminal to ask


class Screen:
    """What a verb says its results with; `note` is for what passes by."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._values: Mapping[str, Any] = {}

    def say(self, *lines: str) -> None:
        """Print lines of the result (to standard error under --json)."""
        for line in lines:
            print(line, flush=True)

    def note(self, *lines: str) -> None:
        """Print lines of progress to standard error."""
        for line in lines:
            print(line, file=sys.stderr, flush=True)

    def show(self, drawing: RenderableType) -> None:
        """Draw a table or coloured text as part of the result."""
        console(sys.stdout).print(drawing)

    def result(self, values: Mapping[str, Any]) -> None:
        """Set what --json answers."""
        self._values = values


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Draw a progress bar on standard error while something counted goes on, and yield what moves it by one."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(sys.stderr), transient=True) as drawn:
        task = drawn.add_task(title, total=total)
        yield lambda: drawn.advance(task)


@contextmanager
def screen(as_json: bool) -> Iterator[Screen]:
    """Yield the screen of one verb; on success --json prints the object that `result` was given."""
    made = Screen(as_json)
    if not as_json:
        yield made
        return
    with redirect_stdout(sys.stderr):
        yield made
    print_json(made._values)


@contextmanager
def in_options(words: Mapping[str, str]) -> Iterator[None]:
    """Say what the caller of a function is told to do as what the user of the command does: phrases by phrases."""
    try:
        yield
    except LorakitError as refused:
        said = str(refused)
        for ours, theirs in words.items():
            said = said.replace(ours, theirs)
        raise type(refused)(said) from refused


def print_json(values: Mapping[str, Any]) -> None:
    """Print one JSON object; what is not finite is null, because JSON has no word for it."""
    text = json.dumps(_plain(values), ensure_ascii=False, allow_nan=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:  # half a character, or a stream that is not UTF-8
        text = json.dumps(_plain(values), allow_nan=False)
    print(text, flush=True)


def print_error(kind: str, message: str, as_json: bool) -> None:
    """Print `error: ...` to standard error, and under --json the object to standard output."""
    out = console(sys.stderr)
    out.print("error:", style="bold red", end=" ")
    out.print(message, markup=False, soft_wrap=True)
    if as_json:
        print_json({"error": {"kind": kind, "message": message}})


def console(file: Any) -> Console:
    """Return a rich console that keeps our words as they are; on a pipe it writes plain text."""
    from rich.console import Console

    class Ours(Console):
        """A console that leaves the end of a pipe to `cli.app`, where rich would exit with 1."""

        def on_broken_pipe(self) -> None:
            raise

    width = None if file.isatty() else WIDTH
    return Ours(file=file, highlight=False, markup=False, emoji=False, width=width)


def table(title: str, *columns: str, rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> RenderableType:
    """Return a table; `numbers` are the columns that are right-aligned."""
    from rich import box
    from rich.table import Table

    drawn = Table(
        title=title or None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        show_edge=False,
    )
    for place, name in enumerate(columns):
        drawn.add_column(name, justify="right" if place in numbers else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    return drawn


def printable(text: str) -> str:
    """Return a model's words for a terminal: control characters, which could steer it, as U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def peak(device: str) -> str:
    """Return what a run's peak of memory is of: torch counts it on CUDA, elsewhere it is all the process held."""
    return "peak" if device.startswith("cuda") else "process peak"


def quiet_libraries() -> None:
    """Keep other libraries' banners, bars and advice off the screen; what concerns the user we say ourselves."""
    import logging
    import warnings

    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "BITSANDBYTES_NOWELCOME": "1",
    }.items():
        os.environ.setdefault(name, value)
    for name in ("bitsandbytes", "accelerate", "datasets", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
