"""What closes LoRA's gap to full fine-tuning on E2E: rate, rank, LoRA+, the embeddings or the output layer?

Half an epoch (212 steps of 1,024 tokens) of the bundled base for each idea, scored on the validation data.
Writes docs/results/e2e-ideas.json after every run and goes on where it stopped.
Run: python bench/e2e_ideas.py
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from full import _batches
from record import RESULTS, record
from transformers import get_cosine_schedule_with_warmup, set_seed

from lorakit import attach, param_groups
from lorakit.training.loss import mean_loss, summed_loss
from lorakit.training.recipe import make_recipe
from lorakit.training.stage import build_stage

DATA = Path(__file__).parents[2] / "shared" / "data" / "e2e"
EPOCHS, WARMUP = 0.5, 7
WITH_HEAD = ["all-linear", "lm_head"]
IDEAS: tuple[dict[str, Any], ...] = (
    {"way": "full", "lr": 5e-4},
    {"way": "full", "lr": 1e-3},
    {"way": "full", "lr": 2e-3},
    {"way": "full", "lr": 4e-3},
    {"way": "lora", "lr": 4e-3, "rank": 16, "alpha": 32},
    {"way": "lora", "lr": 8e-3, "rank": 16, "alpha": 32},
    {"way": "lora", "lr": 1.5e-3, "up": 8.0, "rank": 16, "alpha": 32},
    {"way": "lora", "lr": 8e-3, "rank": 64, "alpha": 64},
    {"way": "lora", "lr": 2e-3, "rank": 64, "alpha": 128},
    {"way": "lora", "lr": 1e-3, "up": 16.0, "rank": 64, "alpha": 64},
    {"way": "lora", "lr": 2e-3, "up": 16.0, "rank": 64, "alpha": 64},
    {"way": "lora", "lr": 1e-3, "up": 16.0, "rank": 128, "alpha": 128},
    {"way": "lora", "lr": 2e-3, "rank": 64, "alpha": 64, "targets": ["all-linear", "embed_tokens"]},
    {"way": "lora", "lr": 1.5e-3, "up": 8.0, "rank": 16, "alpha": 32, "train": ["embed_tokens"]},
    {"way": "lora", "lr": 1e-3, "up": 16.0, "rank": 64, "alpha": 64, "train": ["embed_tokens"]},
    {"way": "lora", "lr": 1e-3, "up": 16.0, "rank": 64, "alpha": 128, "train": ["embed_tokens"]},
    {"way": "lora", "lr": 1.5e-3, "up": 8.0, "rank": 16, "alpha": 32, "targets": WITH_HEAD},
    {"way": "lora", "lr": 1e-3, "up": 16.0, "rank": 32, "alpha": 32, "targets": WITH_HEAD},
    {"way": "lora", "lr": 1e-3, "up": 16.0, "rank": 64, "alpha": 64, "targets": WITH_HEAD},
)


def run(way: str, lr: float, up: float = 1.0, **adapter: Any) -> dict[str, Any]:
    """Train one idea with a plain loop and return its figures."""
    set_seed(0)
    files = {"train": str(DATA / "train.jsonl"), "validation": str(DATA / "validation.jsonl"), "max_length": 512}
    recipe = make_recipe(
        {"model": "lorakit/tales", "data": files, "adapter": {"method": "lora", **adapter},
         "train": {"lr": lr, "batch_tokens": 1024}}
    )  # fmt: skip
    stage = build_stage(recipe)
    model, steps = stage.model, math.ceil(len(stage.train.dataset) / stage.batch_rows * EPOCHS)
    groups: Any = model.parameters()
    if way == "lora":
        attach(model, stage.spec)
        groups = param_groups(model, lr, up)
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, steps)
    moving = [p for p in model.parameters() if p.requires_grad]
    model.train()
    began = time.perf_counter()
    for _, batch in zip(range(steps), _batches(stage, 0), strict=False):
        loss, trained = summed_loss(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"])
        (loss / trained).backward()
        torch.nn.utils.clip_grad_norm_(moving, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - began
    assert stage.validation is not None
    loss_after, _ = mean_loss(model.eval(), stage.validation.dataset, 8, stage.tokenizer.pad_token_id)
    parameters = sum(p.numel() for p in moving)
    return {
        "parameters": parameters,
        "steps": steps,
        "validation_loss": round(loss_after, 4),
        "seconds": round(seconds),
    }


def main() -> None:
    file = RESULTS / "e2e-ideas.json"
    runs: list[dict[str, Any]] = json.loads(file.read_text())["runs"] if file.exists() else []
    for idea in IDEAS:
        if not any(made["idea"] == idea for made in runs):
            runs.append({"idea": idea, **run(**idea)})
            print(runs[-1], flush=True)
            record("e2e-ideas", (__doc__ or "").splitlines()[0], ("torch", "transformers"), epochs=EPOCHS, runs=runs)


if __name__ == "__main__":
    main()
