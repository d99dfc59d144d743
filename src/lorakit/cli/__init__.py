"""The command line: one file per verb. Only this room prints."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, TextIO


def main() -> None:
    """Run `lorakit`: quiet the libraries, then hand the arguments to the verb. Ctrl-C is one line, whenever it comes.

    Idle OpenMP threads spin for microseconds, then sleep. Spinning for long starves other programs on the same cores;
    sleeping at once starves us (two quiet cores: 3,030 tokens/s spinning long, 2,990 so, 1,930 sleeping at once).
    """
    try:
        sys.stdout, sys.stderr = sys.stdout or _nowhere(), sys.stderr or _nowhere()
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read once, when torch is loaded
        from lorakit.cli.app import app
        from lorakit.cli.screen import quiet_libraries

        quiet_libraries()
        app()
    except KeyboardInterrupt:  # in the milliseconds before a verb begins or after it ends
        _stop()
    except SystemExit as end:
        if end.code == 130:  # said already; Python would end by the signal if it came inside an exec of some library
            sys.stdout.flush()
            os._exit(130)
        raise
    finally:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _stop)  # what is left is the interpreter's own end, which would complain


def _nowhere() -> TextIO:
    """Return what takes words and drops them, in place of a closed stream (`>&-`), whose number a file would get."""
    return open(os.devnull, "w", encoding="utf-8")


def _stop(*_: Any) -> None:
    """Say it and end at once."""
    print("\ninterrupted", file=sys.stderr, flush=True)
    os._exit(130)
