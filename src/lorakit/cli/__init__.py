"""The command line: one file per verb. Only this room prints."""

from __future__ import annotations


def main() -> None:
    """Run `lorakit`: quiet the libraries, then hand the arguments to the verb."""
    from lorakit.cli.app import app
    from lorakit.cli.screen import quiet_libraries

    quiet_libraries()
    app()
