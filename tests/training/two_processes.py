"""What each of two processes does for tests/training/test_processes.py: several runs, one after the other.

Processes take seconds to start, so they start once. `python two_processes.py FOLDER` reads the recipes there, runs each
with the other process over gloo, and leaves what is not in the run's own folder in `FOLDER/told-<process>.json`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lorakit.errors import LorakitError
from lorakit.training.events import Event
from lorakit.training.recipe import load_recipe
from lorakit.training.run import train

STOPS = ("stopped",)
RESUMED = ("goes_on",)
FAILS = "fails"


def interrupt(event: Event) -> None:
    """Do as Ctrl-C does, in one process alone."""
    if event["event"] == "step" and event["step"] == 1:
        signal.raise_signal(signal.SIGINT)


def main(folder: Path) -> None:
    """Run everything in `folder`; the last one fails in process 1 alone."""
    here, told = int(os.environ["RANK"]), {}
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=here, world_size=2)
    for file in sorted(folder.glob("*.yaml")):
        name = file.stem
        if name == FAILS:
            continue
        try:
            run = train(load_recipe(file), resume=name in RESUMED, listen=interrupt if name in STOPS else None)
            told[name] = {"train_loss": run.train_loss, "tokens": run.tokens}
        except LorakitError as error:
            told[name] = {"error": str(error)}
    dist.destroy_process_group()
    changes = {"data.train": str(folder / "absent.jsonl")} if here == 1 else {}
    try:
        train(load_recipe(folder / f"{FAILS}.yaml", changes))
    except LorakitError as error:
        told[FAILS] = {"error": str(error)}
    (folder / f"told-{here}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
