"""The command line: one file per verb. Only this room prints."""

from __future__ import annotations

import os


def main() -> None:
    """Run `lorakit`: quiet the libraries, then hand the arguments to the verb.

    Idle OpenMP threads sleep: on two cores with another program on them, threads that spin while they wait made
    training fifty times slower (33 tokens/s; 1,581 when they sleep).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is loaded
    from lorakit.cli.app import app
    from lorakit.cli.screen import quiet_libraries

    quiet_libraries()
    app()
