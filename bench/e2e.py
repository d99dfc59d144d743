"""Does LoRA reach full fine-tuning's perplexity on E2E in the same number of steps?

The bundled base on ../shared/data/e2e: each way of training gets its own learning rate, chosen by the validation loss
from the same number of candidates at the same number of steps; the test set is scored once, with the chosen one.
Writes docs/results/e2e.json. Run: python bench/e2e.py [--epochs 3]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from full import full_fine_tuning
from record import record

from lorakit import attach, load
from lorakit.training.base import load_base
from lorakit.training.evaluate import evaluate
from lorakit.training.recipe import DataSection, Recipe, make_recipe
from lorakit.training.run import train
from lorakit.training.stage import build_stage

DATA = Path(__file__).parents[2] / "shared" / "data" / "e2e"
LORA_RATES, FULL_RATES = (1e-3, 2e-3, 4e-3), (5e-4, 1e-3, 2e-3)


def recipe(lr: float, epochs: float, output: str) -> Recipe:
    """Return the recipe of examples/e2e.yaml at a learning rate."""
    return make_recipe(
        {
            "model": "lorakit/tales",
            "data": {
                "train": str(DATA / "train.jsonl"),
                "validation": str(DATA / "validation.jsonl"),
                "max_length": 512,
            },
            "adapter": {"method": "lora", "rank": 16, "alpha": 32, "targets": "all-linear"},
            "train": {"epochs": epochs, "lr": lr, "batch_tokens": 4096},
            "output": output,
        }
    )


def scores(model: Any, tokenizer: Any, data: DataSection) -> dict[str, float | None]:
    """Return test perplexity and BLEU."""
    found = evaluate(model, tokenizer, str(DATA / "test.jsonl"), data, bleu=True, max_new_tokens=80, batch_size=64)
    return {"perplexity": found.perplexity, "bleu": found.bleu, "tokens": found.count}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--epochs", type=float, default=3.0)
    epochs: float = arguments.parse_args().epochs
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        base, tokenizer = load_base("lorakit/tales")
        before = scores(base, tokenizer, recipe(1e-3, epochs, folder).data)
        print({"base": before}, flush=True)
        for lr in LORA_RATES:
            done = train(recipe(lr, epochs, f"{folder}/lora-{lr}"))
            runs.append({"way": "lora", "lr": lr, "steps": done.steps, "seconds": done.seconds,
                         "trainable_parameters": done.trainable_parameters, "validation_loss": done.validation_loss,
                         "output": done.output})  # fmt: skip
            print(runs[-1], flush=True)
        steps = runs[0]["steps"]
        models: dict[float, Any] = {}
        for lr in FULL_RATES:
            stage = build_stage(recipe(lr, epochs, folder))
            seconds = full_fine_tuning(stage, lr, steps)
            loss = evaluate(
                stage.model, stage.tokenizer, str(DATA / "validation.jsonl"), recipe(lr, 1, folder).data
            ).loss
            models[lr] = stage.model
            runs.append({"way": "full", "lr": lr, "steps": steps, "seconds": seconds,
                         "trainable_parameters": sum(p.numel() for p in stage.model.parameters()),
                         "validation_loss": loss})  # fmt: skip
            print(runs[-1], flush=True)
        best = {
            way: min((r for r in runs if r["way"] == way), key=lambda r: r["validation_loss"])
            for way in ("lora", "full")
        }
        after = {"full": scores(models[best["full"]["lr"]], tokenizer, recipe(1, 1, folder).data)}
        adapted, tokenizer = load_base("lorakit/tales")
        attach(adapted, load(f"{best['lora']['output']}/adapter"))
        after["lora"] = scores(adapted, tokenizer, recipe(1, 1, folder).data)
    for run in runs:
        run.pop("output", None)
    ratio = after["lora"]["perplexity"] / after["full"]["perplexity"]  # type: ignore[operator]
    file = record(
        "e2e",
        (__doc__ or "").splitlines()[0],
        ("torch", "transformers", "sacrebleu"),
        epochs=epochs,
        runs=runs,
        chosen={way: run["lr"] for way, run in best.items()},
        test={"base": before, **after},
        lora_over_full_perplexity=ratio,
    )
    print(after, f"perplexity of LoRA over full fine-tuning: {ratio:.4f}", file, sep="\n")


if __name__ == "__main__":
    main()
