"""The command line: one file per verb. Only this room prints."""

from __future__ import annotations

import os


def main() -> None:
    """Run `lorakit`: quiet the libraries, then hand the arguments to the verb.

    Idle OpenMP threads spin for microseconds, then sleep. Spinning for long starves other programs on the same cores;
    sleeping at once starves us (two quiet cores: 3,030 tokens/s spinning long, 2,990 so, 1,930 sleeping at once).
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read once, when torch is loaded
    from lorakit.cli.app import app
    from lorakit.cli.screen import quiet_libraries

    quiet_libraries()
    app()
