"""Does LoRA reach full fine-tuning's perplexity on E2E in the same number of steps?

The bundled base on ../shared/data/e2e, one epoch. Each way of training gets its own learning rate, chosen by the
validation loss from the same number of candidates, the best one inside the range; the test set is scored once, with the
chosen one. Runs are kept in runs/bench-e2e, so a stopped bench goes on. Writes docs/results/e2e.json.
Run: python bench/e2e.py
"""

from __future__ import annotations

import json
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

ROOT = Path(__file__).parents[1]
DATA, WORK = ROOT.parent / "shared" / "data" / "e2e", ROOT / "runs" / "bench-e2e"
EPOCHS, BATCH_TOKENS = 1, 1024
ADAPTER = {"method": "lora", "rank": 64, "alpha": 64, "targets": ["all-linear", "lm_head"]}
UP_RATIO = 16.0  # LoRA+: how much faster B learns than A
RATES = {"lora": (5e-4, 7e-4, 1e-3), "full": (1e-3, 2e-3, 4e-3)}


def recipe(lr: float, output: Path) -> Recipe:
    """Return the recipe of one run: that of examples/e2e.yaml; full fine-tuning takes its data alone."""
    return make_recipe(
        {
            "model": "lorakit/tales",
            "data": {
                "train": str(DATA / "train.jsonl"),
                "validation": str(DATA / "validation.jsonl"),
                "max_length": 512,
            },
            "adapter": ADAPTER,
            "train": {
                "epochs": EPOCHS,
                "lr": lr,
                "up_ratio": UP_RATIO,
                "batch_tokens": BATCH_TOKENS,
                "evaluate_every": 1000,
                "save_every": 1000,
            },
            "output": str(output),
        }
    )


def lora(lr: float) -> dict[str, Any]:
    """Train an adapter, or take the finished one."""
    output = WORK / f"lora-{lr}"
    done = train(recipe(lr, output), resume=(output / "events.jsonl").exists())
    return {
        "steps": done.steps,
        "seconds": round(done.seconds, 1),
        "trainable_parameters": done.trainable_parameters,
        "validation_loss": score(output, "validation").loss,
    }


def full(lr: float, steps: int) -> dict[str, Any]:
    """Train every weight, or take the finished model."""
    output = WORK / f"full-{lr}"
    noted = output / "bench.json"
    if not noted.exists():
        stage = build_stage(recipe(lr, output))
        seconds = full_fine_tuning(stage, lr, steps)
        stage.model.save_pretrained(output)
        stage.tokenizer.save_pretrained(output)
        parameters = sum(p.numel() for p in stage.model.parameters())
        noted.write_text(json.dumps({"steps": steps, "seconds": round(seconds, 1), "trainable_parameters": parameters}))
    return {**json.loads(noted.read_text()), "validation_loss": score(output, "validation").loss}


def score(place: Path | None, part: str, *, bleu: bool = False) -> Any:
    """Score the base, an adapter on it or a fully fine-tuned model on a part of the data."""
    is_whole = place is not None and not (place / "adapter").exists()
    model, tokenizer = load_base(str(place) if is_whole else "lorakit/tales")
    if place is not None and not is_whole:
        attach(model, load(place / "adapter"))
    source = str(DATA / f"{part}.jsonl")
    data = DataSection(max_length=512)
    return evaluate(model, tokenizer, source, data, bleu=bleu, max_new_tokens=80, batch_size=64)


def main() -> None:
    runs: list[dict[str, Any]] = []
    for way, rates in RATES.items():
        for lr in rates:
            made = full(lr, runs[0]["steps"]) if way == "full" else lora(lr)
            runs.append({"way": way, "lr": lr, **made})
            print(runs[-1], flush=True)
    chosen = {w: min((r for r in runs if r["way"] == w), key=lambda r: r["validation_loss"])["lr"] for w in RATES}
    test = {}
    for way in ("base", *RATES):
        found = score(WORK / f"{way}-{chosen[way]}" if way in chosen else None, "test", bleu=True)
        test[way] = {"perplexity": found.perplexity, "bleu": found.bleu, "completion_tokens": found.count}
        print(way, test[way], flush=True)
    file = record(
        "e2e",
        (__doc__ or "").splitlines()[0],
        ("torch", "transformers", "sacrebleu"),
        epochs=EPOCHS,
        batch_tokens=BATCH_TOKENS,
        runs=runs,
        chosen=chosen,
        test=test,
        lora_over_full_perplexity=test["lora"]["perplexity"] / test["full"]["perplexity"],
    )
    print(file)


if __name__ == "__main__":
    main()
