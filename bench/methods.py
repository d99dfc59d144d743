"""Does every method learn? The quickstart's task, the same 150 steps, each method at a learning rate of its own.

The rate is chosen by the loss on records that are neither trained on nor scored; the score is the share of held-out
records whose facts are all told. Also: parameters, adapter bytes, the processor time of a step (one thread, in turn
with plain LoRA's), and the bytes autograd saves in one.
Runs are kept in runs/bench-methods, so a stopped bench goes on; docs/results/methods.json is written after each.
Run: python bench/methods.py [method ...]; --below tries what else could lift the methods below 80 %; --table prints
what is known
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from record import RESULTS, record

from lorakit import attach, load
from lorakit.cli.quickstart import HELD_OUT, ROWS, STRANGERS, TRAIN, Task, measure
from lorakit.core.state import AdapterState
from lorakit.data import Collator
from lorakit.data.fables import fables
from lorakit.inject.penalty import penalty
from lorakit.training.base import load_base
from lorakit.training.loss import logits_of, summed_loss
from lorakit.training.recipe import Recipe, load_recipe, make_recipe
from lorakit.training.run import train
from lorakit.training.stage import build_stage

ROOT = Path(__file__).parents[1]
WORK, EXAMPLES = ROOT / "runs" / "bench-methods", ROOT / "examples" / "methods"
SPREAD = (1 / 3, 1.0, 3.0)
"""The candidates: the rate of the example's recipe, a third of it, three times it; and on while the end is the best."""
WIDENED = 2
TIMED_STEPS = 7
ALL_HEADS = {"targets": ["q_proj", "k_proj", "v_proj", "o_proj"],
             "overrides": [{"targets": ["k_proj", "v_proj"], "fields": {"heads": 2}},
                           {"targets": "o_proj", "fields": {"side": "down"}}]}  # fmt: skip
BELOW: dict[str, tuple[str, dict[str, Any], int, float]] = {
    "per-head, all of attention": ("per-head", ALL_HEADS, 1, 0.015),
    "per-head, four epochs": ("per-head", {}, 4, 0.015),
    "lora, queries alone": ("lora", {"targets": "q_proj"}, 1, 0.015),
    "compacter-plus-plus, four epochs": ("compacter-plus-plus", {}, 4, 0.09),
    "norms, four epochs": ("norms", {}, 4, 0.09),
    "prefix-layer, four epochs": ("prefix-layer", {}, 4, 0.03),
    "prefix-embedding, four epochs": ("prefix-embedding", {}, 4, 0.03),
    "prompt-tuning, four epochs": ("prompt-tuning", {}, 4, 0.09),
    "prompt-tuning, 64 tokens": ("prompt-tuning", {"tokens": 64}, 1, 0.09),
}
"""A recipe, what is changed of its adapter, the epochs, and the recipe's best rate (per-head's for LoRA on queries)."""


def example(name: str) -> dict[str, Any]:
    """Return a recipe of examples/methods as plain values."""
    values: dict[str, Any] = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    load_recipe(EXAMPLES / f"{name}.yaml")  # refuses what no run would take
    return values


def recipe(name: str, lr: float, output: Path, changes: dict[str, Any] | None = None, epochs: int = 1) -> Recipe:
    """Return the recipe of one run: the example's adapter at another rate, on the quickstart's rows and steps."""
    values = example(name)
    return make_recipe(
        {
            "model": "lorakit/tales",
            "data": {
                "train": str(WORK / "data" / "train.jsonl"),
                "validation": str(WORK / "data" / "validation.jsonl"),
                "format": "prompt+completion",
                "separator": "",
            },
            "adapter": values["adapter"] | (changes or {}),
            "train": {
                **TRAIN,
                "epochs": epochs,
                "up_ratio": values["train"].get("up_ratio", 1.0),
                "lr": lr,
                "evaluate_every": 1000,
                "save_every": 1000,
                "dtype": "fp32",
            },
            "output": str(output),
        }
    )


def write_rows() -> Task:
    """Write the quickstart's records of seed 0, and others to choose the rates by."""
    task = Task(fables("train", ROWS, 0), fables("held-out", HELD_OUT, 0), fables("strangers", STRANGERS, 0))
    (WORK / "data").mkdir(parents=True, exist_ok=True)
    for part, told in {
        "train": task.train,
        "held-out": task.held_out,
        "validation": fables("held-out", 200, 7),
    }.items():
        lines = "".join(json.dumps(fable.row) + "\n" for fable in told)
        (WORK / "data" / f"{part}.jsonl").write_text(lines, encoding="utf-8")
    return task


def once(name: str, lr: float) -> dict[str, Any]:
    """Train once, or take the finished run; return its validation loss and what it took."""
    output = WORK / f"{name}-{lr:.2g}"
    done = train(recipe(name, lr, output), resume=(output / "events.jsonl").exists())
    return {"lr": lr, "validation_loss": done.validation_loss, "parameters": done.trainable_parameters}


def tuned(name: str) -> list[dict[str, Any]]:
    """Return the runs at the candidate rates, widened while the best is at an end."""
    middle = float(example(name)["train"]["lr"])
    tried = {lr: once(name, lr) for lr in (middle * factor for factor in SPREAD)}
    for _ in range(WIDENED):
        best = min(tried, key=lambda lr: tried[lr]["validation_loss"])
        if min(tried) < best < max(tried):
            break
        lr = best / 3 if best == min(tried) else best * 3
        tried[lr] = once(name, lr)
    return [tried[lr] for lr in sorted(tried)]


def stepper(wanted: Recipe, adapter: AdapterState | None = None) -> tuple[Callable[[], float], int]:
    """Return what runs one training step and tells its seconds of processor time, and the bytes autograd kept in one.

    The bytes are those between forward and backward of one batch, parameters left out. `adapter` is attached as it was
    trained, a fresh one if None.
    """
    stage = build_stage(wanted)
    attach(stage.model, adapter or stage.spec)
    model = stage.model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    batch = Collator(stage.tokenizer.pad_token_id)([stage.train.dataset[i] for i in range(stage.batch_rows)])
    labels = batch.pop("labels")

    def step() -> float:
        began = time.process_time()
        loss, trained = summed_loss(logits_of(model, batch, labels), labels)
        term = penalty(model)
        (loss / trained if term is None else loss / trained + term).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - began

    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return step, sum(kept.values())


def cost(wanted: Recipe, adapter: AdapterState) -> dict[str, Any]:
    """Return the processor time of a step, alone and against plain LoRA's taken in turn with it, and what it keeps."""
    step, kept = stepper(wanted, adapter)
    plain, _ = stepper(recipe("lora", 0.005, WORK / "unused"))
    own, lora = zip(*((step(), plain()) for _ in range(TIMED_STEPS)), strict=True)
    return {
        "step_seconds": round(statistics.median(own), 4),
        "step_against_lora": round(statistics.median(own) / statistics.median(lora), 3),
        "saved_bytes": kept,
    }


def judged(name: str, task: Task) -> dict[str, Any]:
    """Tune a method, then score its best run once."""
    runs = tuned(name)
    best = min(runs, key=lambda run: run["validation_loss"])
    output = WORK / f"{name}-{best['lr']:.2g}"
    wanted = recipe(name, best["lr"], output)
    return {
        "method": name,
        "adapter": example(name)["adapter"],
        **best,
        "adapter_bytes": sum(file.stat().st_size for file in (output / "adapter").glob("adapter*.safetensors")),
        **cost(wanted, load(output / "adapter")),
        **scores(wanted, output, task),
        "runs": runs,
    }


def scores(wanted: Recipe, output: Path, task: Task) -> dict[str, float]:
    """Return what the adapter of a finished run tells of the held-out records and of strangers."""
    model, tokenizer = load_base("lorakit/tales", dtype="fp32")
    attach(model, load(output / "adapter"))
    (output / "data").mkdir(exist_ok=True)
    (output / "data" / "held-out.jsonl").write_bytes((WORK / "data" / "held-out.jsonl").read_bytes())
    scored = measure(model, tokenizer, wanted, task)
    return {"told": scored.told, "told_of_strangers": scored.told_of_strangers, "perplexity": scored.perplexity}


def lifted(what: str, task: Task) -> dict[str, Any]:
    """Train and score one way to lift a method that stayed low."""
    name, changes, epochs, lr = BELOW[what]
    output = WORK / what.replace(", ", "-").replace(" ", "-")
    wanted = recipe(name, lr, output, changes, epochs)
    done = train(wanted, resume=(output / "events.jsonl").exists())
    return {"what": what, "lr": lr, "epochs": epochs, "parameters": done.trainable_parameters,
            "validation_loss": done.validation_loss, **scores(wanted, output, task)}  # fmt: skip


def table() -> str:
    """Return what is known as Markdown, the best score first, and what lifts the lowest."""
    found, lifts = known()
    head = "| method | parameters | adapter, kB | step, LoRA = 1 | kept, MB | rate | told | of strangers | perplexity |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|"]
    for row in sorted(found, key=lambda row: -row["told"]):
        lines.append(
            f"| {row['method']} | {row['parameters']:,} | {row['adapter_bytes'] / 1e3:,.0f} | "
            f"{row['step_against_lora']:.2f} | {row['saved_bytes'] / 1e6:.0f} | {row['lr']:.2g} | {row['told']:.1%} | "
            f"{row['told_of_strangers']:.0%} | {row['perplexity']:.3f} |"
        )
    lines += ["", "| also tried | parameters | told | of strangers | perplexity |", "|---|---|---|---|---|"]
    for row in lifts:
        lines.append(
            f"| {row['what']} | {row['parameters']:,} | {row['told']:.1%} | {row['told_of_strangers']:.0%} | "
            f"{row['perplexity']:.3f} |"
        )
    return "\n".join(lines)


def known() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return what is recorded: the methods, and what lifts those below 80 %."""
    file = RESULTS / "methods.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    return found.get("methods", []), found.get("below", [])


def note(methods: list[dict[str, Any]], below: list[dict[str, Any]]) -> None:
    """Record both lists; another process may have added some since they were read."""
    record("methods", (__doc__ or "").splitlines()[0], ("torch", "transformers"), methods=methods, below=below)


def main() -> None:
    if sys.argv[1:] == ["--table"]:
        print(table())
        return
    torch.set_num_threads(1)
    task = write_rows()
    if sys.argv[1:] == ["--below"]:
        for what in BELOW:
            if all(made["what"] != what for made in known()[1]):
                made = lifted(what, task)
                print(made, flush=True)
                methods, below = known()
                note(methods, [*below, made])
        return
    every = sorted(path.stem for path in EXAMPLES.glob("*.yaml") if path.stem != "bitfit")  # the base has no biases
    for name in sys.argv[1:] or every:
        if all(made["method"] != name for made in known()[0]):
            made = judged(name, task)
            print({key: value for key, value in made.items() if key != "runs"}, flush=True)
            methods, below = known()
            note([*methods, made], below)


if __name__ == "__main__":
    main()
