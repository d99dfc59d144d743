"""What do shorter rows and shared prompts save on E2E, and does the validation loss stay where it was?

The recipe of bench/e2e.py, its steps packed three ways: rows as long as `max_length`, rows of the length that costs
least, and those with each prompt once for all its answers. Steps of the three take turns, in processor time at one
thread; then each trains on the examples of 60 steps, and is scored on unpacked validation rows.
Writes docs/results/packing.json. Run: python bench/packing.py
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from e2e import DATA, WORK, recipe
from record import record

from lorakit.training.arguments import make_plan
from lorakit.training.base import load_base
from lorakit.training.evaluate import evaluate
from lorakit.training.groups import param_groups
from lorakit.training.loss import batches, mean_of_batch, trained_labels
from lorakit.training.order import row_lengths, row_order
from lorakit.training.recipe import DataSection, Recipe
from lorakit.training.run import attached, train
from lorakit.training.stage import Stage, build_stage

RATE, STEPS, SEEDS, TURNS = 7e-4, 60, (0,), 10
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "long rows": ({"packing": "always", "share_prompts": "never"}, {"batch_size": 2, "batch_tokens": None}),
    "short rows": ({"share_prompts": "never"}, {}),
    "shared prompts": ({}, {}),
}


def of(way: str, seed: int = 0, steps: int | None = None) -> Recipe:
    """Return the recipe of one way, as long as the epoch or of so many steps."""
    whole, (data, given) = recipe(RATE, WORK / f"packing-{way.replace(' ', '-')}-{seed}"), WAYS[way]
    data = whole.data.model_copy(update={**data, "validation": None})
    given = {**given, "seed": seed, "steps": steps, "device": "cpu", "save_every": steps}
    return whole.model_copy(update={"data": data, "train": whole.train.model_copy(update=given)})


def stepper(wanted: Recipe, stage: Stage) -> Callable[[], tuple[float, int]]:
    """Return what runs the next step and tells its seconds of processor time and its trained tokens."""
    attached(wanted, stage, None)
    model = stage.model.train()
    optimizer = torch.optim.AdamW(param_groups(model, RATE, wanted.train.up_ratio, 0.0))
    rows = stage.train.dataset.select(list(islice(row_order(wanted, stage), stage.batch_rows * (TURNS + 1))))
    few: Iterator[dict[str, torch.Tensor]] = batches(rows, stage.batch_rows, stage.tokenizer.pad_token_id, "cpu")

    def step() -> tuple[float, int]:
        batch = next(few)
        began = time.process_time()
        loss = mean_of_batch(model, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert float(norm) > 0
        return time.process_time() - began, int(trained_labels(batch["labels"]))

    return step


def scored(way: str, seed: int, steps: int) -> float:
    """Train so many steps and return the loss on unpacked validation rows; the loss must have fallen."""
    from lorakit import attach, load

    wanted = of(way, seed, steps)
    shutil.rmtree(wanted.output, ignore_errors=True)
    losses: list[float] = []
    done = train(wanted, listen=lambda event: losses.append(event["loss"]) if event["event"] == "step" else None)
    assert statistics.mean(losses[-5:]) < statistics.mean(losses[:5])
    model, tokenizer = load_base("lorakit/tales", device="cpu")
    attach(model, load(done.adapter_dir))
    loss: float = evaluate(model, tokenizer, str(DATA / "validation.jsonl"), DataSection(max_length=512)).loss
    return loss


def main() -> None:
    torch.set_num_threads(1)
    stages = {way: build_stage(of(way)) for way in WAYS}
    found: dict[str, dict[str, Any]] = {}
    for way, stage in stages.items():
        report, epoch = stage.train.report, make_plan(of(way), stage).steps_per_epoch
        found[way] = {
            "row_length": report.row_length,
            "rows_per_step": stage.batch_rows,
            "steps_per_epoch": epoch,
            "tokens_per_epoch": sum(row_lengths(stage.train.dataset)),
            "efficiency": report.packing_efficiency,
            "steps_compared": math.ceil(
                STEPS * epoch / make_plan(of("long rows"), stages["long rows"]).steps_per_epoch
            ),
        }
    steps, times = {way: stepper(of(way), stage) for way, stage in stages.items()}, {way: [] for way in WAYS}
    for turn in range(TURNS + 1):
        for way, step in steps.items():
            taken = step()
            if turn:  # the first one warms up
                times[way].append(taken)
    first = stages["long rows"].train.report
    each = first.trained_tokens / first.kept
    for way, taken in times.items():
        found[way]["ms_per_example"] = 1e3 * each * statistics.median(seconds / trained for seconds, trained in taken)
        print(way, found[way], flush=True)
    for way in WAYS:
        found[way]["validation_losses"] = [scored(way, seed, found[way]["steps_compared"]) for seed in SEEDS]
        print(way, found[way], flush=True)
    print(record("packing", (__doc__ or "").splitlines()[0], ("torch", "transformers"), threads=1, examples=first.kept,
                 ways=found))  # fmt: skip


if __name__ == "__main__":
    main()
