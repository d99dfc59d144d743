"""The verbs in one place, and what happens when one fails.

Exit codes: 0 it worked; 2 the user can repair it (`error: ...`, no traceback); 130 interrupted; 141 nobody reads what
it says any more (`| head`), as of any program that SIGPIPE ends; an unexpected exception is our bug and keeps its
traceback. Nothing heavy is imported here: a verb is imported when it is asked for, and imports what it needs when it
runs.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lorakit.cli.screen import print_error
from lorakit.errors import LorakitError

VERBS = {
    "quickstart": "Teach the bundled model a new task in two minutes.",
    "plan": "Say what a run will train, hold and take.",
    "train": "Train an adapter from a recipe.",
    "evaluate": "Score a model on a file of rows, before and after.",
    "generate": "Write answers to prompts.",
    "inspect": "Say what an adapter learned, and how much of its rank it used.",
    "diff": "Say how two adapters differ.",
    "compress": "Write a smaller adapter, and say what it lost.",
    "combine": "Write the adapter that several of one base make together.",
    "extract": "Make a LoRA of a model that was tuned whole.",
    "merge": "Fold an adapter into its base and write the merged model.",
    "convert": "Write an adapter in another format.",
    "quantize": "Pack a base into 4 bits, in bitsandbytes' format.",
    "export": "Write an adapter as vLLM or llama.cpp reads it.",
    "serve": "Serve a base and many adapters behind OpenAI's API.",
    "bench": "Put a load on a running server and time its answers.",
    "methods": "List the update methods, or explain one.",
}
"""The verbs in the order of use, each the function of its name in the module of its name, and its line in the help."""

_UsageError: type[Exception] = typer.BadParameter.__mro__[2]  # click's root, of whichever click this typer brings

_ENVIRONMENT = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG)
"""What no program can help: full and read-only disks, forbidden places, names too long."""


class OnDemand(Mapping[str, Any]):
    """The commands of `VERBS`, each imported when it is looked up: the list of them needs none."""

    def __iter__(self) -> Iterator[str]:
        return iter(VERBS)

    def __len__(self) -> int:
        return len(VERBS)

    def __getitem__(self, verb: str) -> Any:
        if verb not in VERBS:
            raise KeyError(verb)
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        alone.command(verb)(getattr(import_module(f"lorakit.cli.{verb}"), verb))
        return typer.main.get_command(alone)


class Verbs(TyperGroup):
    """The group of verbs, which turns every failure into its exit code."""

    def __init__(self, **settings: Any) -> None:
        assert not settings.get("commands"), "a verb is a row of VERBS"
        super().__init__(**settings)
        self.commands = OnDemand()  # type: ignore[assignment]

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the verbs, without importing one."""
        return list(VERBS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the verbs, a line each."""
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> Any:  # type: ignore[override]
        """Run one verb and exit."""
        arguments = list(sys.argv[1:] if args is None else args) or ["--help"]
        as_json = "--json" in arguments
        try:
            code = self._answer(arguments, prog_name, extra, as_json)
        except BrokenPipeError:  # an error that nobody reads
            code = _unread()
        except OSError as error:
            if error.errno not in _ENVIRONMENT:
                raise
            if error.filename is None:  # nothing but the standard streams is written without a name
                _discard_output()
            print_error("OSError", f"{error.filename or 'standard output'}: {error.strerror}", as_json)
            code = 2
        sys.exit(code)

    def _answer(self, arguments: list[str], prog_name: str | None, extra: dict[str, Any], as_json: bool) -> int:
        """Run one verb and return its exit code, after saying what the user can repair."""
        try:
            code = super().main(arguments, prog_name, **{**extra, "standalone_mode": False})
            return code if isinstance(code, int) else 0
        except LorakitError as error:
            print_error(type(error).__name__, str(error), as_json)
            return 2
        except _UsageError as error:
            print_error("UsageError", _usage(error), as_json)
            return 2
        except typer.Abort:
            print("\ninterrupted", file=sys.stderr)
            return 130

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; Ctrl-C gives one line, with the way to go on where the verb knows one, a closed pipe none."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise typer.Exit(_unread()) from None
        except KeyboardInterrupt as stop:
            hint = f"; {stop}" if str(stop) else ""
            print(f"\ninterrupted{hint}", file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Verbs,
    help="Make a pretrained model yours with a low-rank update.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from lorakit import __version__

        print(f"lorakit {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Make a pretrained model yours with a low-rank update: plan, train, evaluate, generate, inspect, merge."""


def _unread() -> int:
    """End the output that nobody reads any more, and return the exit code for that."""
    _discard_output()
    return 141


def _discard_output() -> None:
    """Send what is still buffered for an output that takes no more to nowhere, so that ending says nothing of it."""
    with suppress(OSError, ValueError):  # a stream without a descriptor has nothing to end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage(error: Any) -> str:
    """Return what was wrong with the arguments, and where the right ones are listed."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "lorakit"
    return f"{error.format_message()}\n{command} --help lists what it takes"
