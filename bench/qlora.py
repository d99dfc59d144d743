"""What does training on a 4-bit base cost in quality, and what does it save in memory?

Memory: the peak resident memory of a whole process (what `/usr/bin/time -v` prints) that trains LoRA on a random Llama
of 350M parameters, less that of a process that imports the same libraries: on the 16-bit base, on one that
is packed while it is read, and on one packed before, for several ranks. Quality: LoRA on 16 and on 4 bits, same seeds,
same data: the quickstart's task on the bundled base, and SST-2 on MiniLM.
Run: python bench/qlora.py [memory] [quality]; quality goes on where it stopped
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from record import RESULTS, peak_bytes, record

if TYPE_CHECKING:
    from lorakit.training.recipe import Recipe

LAYERS, WIDTH, INNER = 27, 1024, 2816
ROWS, TOKENS, STEPS = 1, 128, 4
RANKS = (8, 16)
REPEATS = 3
KINDS = ("imports", "16-bit", "4-bit, packed on the way in", "4-bit, packed before")


def write_base(folder: Path) -> int:
    """Write a random Llama shape in bf16 for the bundled tokenizer; return its parameters."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from lorakit.training.base import resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve("lorakit/tales"))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def one(kind: str, folder: Path, rank: int) -> None:
    """Run one process's work and print its peak memory and speed."""
    import accelerate
    import bitsandbytes
    import datasets

    from lorakit.training import run, stage, trainer
    from lorakit.training.recipe import make_recipe

    found: dict[str, Any] = {"modules": len([accelerate, bitsandbytes, datasets, run, stage, trainer])}
    if kind != "imports":
        text = " ".join(["a tale"] * TOKENS)
        rows = folder / "rows.jsonl"
        rows.write_text("".join(json.dumps({"text": text}) + "\n" for _ in range(ROWS * STEPS)))
        done = run.train(
            make_recipe(
                {
                    "model": str(folder / ("packed" if kind.endswith("before") else "base")),
                    "quant": "nf4" if kind.endswith("way in") else None,
                    "data": {"train": str(rows), "max_length": TOKENS, "overlong": "split"},
                    "adapter": {"rank": rank, "alpha": 2 * rank},
                    "train": {"steps": STEPS, "batch_size": ROWS, "dtype": "bf16", "checkpointing": True, "lr": 1e-4},
                    "output": tempfile.mkdtemp(dir=folder),
                }
            )
        )
        found["tokens_per_second"] = round(done.tokens_per_second, 1)
    found["peak_bytes"] = peak_bytes()
    print(json.dumps(found))


def memory() -> dict[str, Any]:
    """Return the peaks of all kinds, each in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        parameters = write_base(folder / "base")
        subprocess.run(
            ["lorakit", "quantize", str(folder / "base"), "--output", str(folder / "packed")],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        floor = statistics.median(peak("imports", folder, 0)["peak_bytes"] for _ in range(REPEATS))
        runs = [
            {"rank": rank, "base": kind, "peaks": [peak(kind, folder, rank)["peak_bytes"] for _ in range(REPEATS)]}
            for rank in RANKS
            for kind in KINDS[1:]
        ]
    for run in runs:
        run["above_imports"] = statistics.median(run["peaks"]) - floor
        dense = next(r for r in runs if (r["rank"], r["base"]) == (run["rank"], "16-bit"))
        run["ratio"] = round(run["above_imports"] / dense["above_imports"], 3)
    return {"parameters": parameters, "rows": ROWS, "tokens": TOKENS, "imports": floor, "runs": runs}


def peak(kind: str, folder: Path, rank: int) -> dict[str, Any]:
    """Run one kind in a process of its own and return its peak memory and speed."""
    command = [sys.executable, __file__, "--one", kind, str(folder), str(rank)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    print(rank, kind, found, flush=True)
    return found


def quality(kept: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the score of each run that is not among the `kept` ones: both tasks, both bases, three seeds."""
    for task, run in (("quickstart", quickstart), ("sst2", sst2)):
        for seed in (0, 1, 2):
            for base in ("16-bit", "4-bit"):
                key = {"task": task, "base": base, "seed": seed}
                if not any(key.items() <= row.items() for row in kept):
                    yield {**key, **run(base, seed)}


def quickstart(base: str, seed: int) -> dict[str, Any]:
    """Train LoRA on the bundled base and return the share of held-out records that are told whole."""
    import methods

    from lorakit import attach, load
    from lorakit.training.base import load_base
    from lorakit.training.run import train

    task = methods.write_rows()
    with tempfile.TemporaryDirectory() as place:
        wanted = with_base(methods.recipe("lora", 5e-3, Path(place) / "run"), base, seed)
        done = train(wanted)
        model, tokenizer = load_base("lorakit/tales", dtype="fp32", quant=wanted.quant)
        attach(model, load(done.adapter_dir))
        (Path(place) / "run" / "data").mkdir()
        held = (methods.WORK / "data" / "held-out.jsonl").read_bytes()
        (Path(place) / "run" / "data" / "held-out.jsonl").write_bytes(held)
        scored = methods.measure(model, tokenizer, wanted, task)
    return {"score": scored.told, "perplexity": scored.perplexity}


def sst2(base: str, seed: int) -> dict[str, Any]:
    """Train LoRA on MiniLM and return the test accuracy."""
    import glue

    from lorakit import attach, load
    from lorakit.training.base import load_base
    from lorakit.training.evaluate import evaluate
    from lorakit.training.run import train

    with tempfile.TemporaryDirectory() as place:
        wanted = with_base(glue.recipe("sst2", "lora-all", 1e-3, seed, f"{place}/run"), base, seed)
        done = train(wanted)
        model, tokenizer = load_base(glue.encoder(), task="classification", labels=done.labels, quant=wanted.quant)
        attach(model, load(done.adapter_dir))
        section = wanted.data.model_copy(update={"labels": done.labels})
        test = str(glue.DATA / "sst2" / "test.jsonl")
        return {"score": evaluate(model, tokenizer, test, section, batch_size=64).accuracy}


def with_base(wanted: Recipe, base: str, seed: int) -> Recipe:
    """Return the recipe on a base in 16 bits or in 4, with a seed."""
    from lorakit.training.recipe import QuantSection

    train = wanted.train.model_copy(update={"seed": seed})
    return wanted.model_copy(update={"quant": QuantSection() if base == "4-bit" else None, "train": train})


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
        return
    wanted = sys.argv[1:] or ["memory", "quality"]
    file = RESULTS / "qlora.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    found = {name: found[name] for name in ("memory", "quality") if name in found}
    keep = partial(record, "qlora", (__doc__ or "").splitlines()[0], ("torch", "transformers", "bitsandbytes"))
    if "memory" in wanted:
        found["memory"] = memory()
        keep(**found)
    if "quality" in wanted:
        for row in quality(found.setdefault("quality", [])):
            print(row, flush=True)
            found["quality"].append(row)
            keep(**found)


if __name__ == "__main__":
    main()
