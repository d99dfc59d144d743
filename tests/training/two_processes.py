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
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lorakit import attach, merge
from lorakit.core.spec import AdapterSpec
from lorakit.errors import LorakitError, MergeError
from lorakit.methods.lora import LoRA
from lorakit.training.base import load_base
from lorakit.training.events import Event
from lorakit.training.recipe import load_recipe
from lorakit.training.run import train
from lorakit.training.sharded import shard

STOPS = ("stopped",)
RESUMED = ("goes_on",)
FAILS = "fails"


def interrupt(event: Event) -> None:
    """Do as Ctrl-C does, in one process alone."""
    if event["event"] == "step" and event["step"] == 1:
        signal.raise_signal(signal.SIGINT)


def sharded(base: str) -> dict[str, Any]:
    """Return what of a base is divided, how much of it is here, and what is plain."""
    model, _ = load_base(base)
    attach(model, AdapterSpec(LoRA(rank=4)))
    shard(model, torch.device("cpu"))
    named = dict(model.named_parameters())
    here = {name: p for name, p in named.items() if isinstance(p, DTensor)}
    try:
        merge(model)
    except MergeError as error:
        return {
            "divided": len(here),
            "local": sum(p.to_local().numel() for p in here.values()),
            "whole": sum(p.numel() for p in here.values()),
            "plain": sorted({name.rpartition("layers.")[2].split(".", 1)[-1] for name in named.keys() - here.keys()}),
            "merge": str(error),
        }
    return {}


def main(folder: Path) -> None:
    """Run everything in `folder`; the last one fails in process 1 alone."""
    here = int(os.environ["RANK"])
    told: dict[str, Any] = {}
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
    told["sharded"] = sharded(load_recipe(folder / "fsdp.yaml").model)
    dist.destroy_process_group()
    changes = {"data.train": str(folder / "absent.jsonl")} if here == 1 else {}
    try:
        train(load_recipe(folder / f"{FAILS}.yaml", changes))
    except LorakitError as error:
        told[FAILS] = {"error": str(error)}
    (folder / f"told-{here}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
