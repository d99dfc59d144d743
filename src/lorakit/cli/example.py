"""The first example as it is trained, in colour on a terminal, else with double brackets; and how long rows are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, TYPE_CHECKING

from lorakit.cli.screen import console, printable

if TYPE_CHECKING:
    from lorakit.data.preview import Run

CHARACTERS = 300  # of each part of the example shown; the rest is counted
BLOCKS = "▁▂▃▄▅▆▇█"


def show_example(runs: Sequence[Sequence[object]], file: IO[str], label: str = "") -> None:
    """Print the runs of an example, each `(text, trained, special)`, below a line that says how to read them."""
    from lorakit.data.preview import Run, coloured, plain

    cut = _shortened([Run(printable(str(text)), bool(trained), bool(special)) for text, trained, special in runs])
    out = console(file)
    colour = out.color_system is not None
    print(f"{label}the first one; what is trained is {'green' if colour else '[[marked]]'}:", file=file, flush=True)
    if colour:
        out.print(coloured(cut), soft_wrap=True)
    else:
        print(plain(cut), file=file, flush=True)


def bars(counts: Sequence[int]) -> str:
    """Return counts as one line of blocks; what is there at all shows."""
    most = max(counts, default=0)
    return "".join(BLOCKS[max(0, round(count / most * len(BLOCKS)) - 1)] if count else " " for count in counts)


def _shortened(runs: list[Run]) -> list[Run]:
    """Keep the beginning and the end of each long run, and say how much is left out between them."""
    half = CHARACTERS // 2
    return [
        run
        if len(run.text) <= CHARACTERS
        else run._replace(
            text=f"{run.text[:half]} ... ({len(run.text) - 2 * half:,} characters) ... {run.text[-half:]}"
        )
        for run in runs
    ]
