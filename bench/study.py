"""Does what the LoRA paper saw in section 7 and appendix F hold for small models too?

matrices       table 5: which attention matrices to adapt, under one number of parameters
ranks          table 6: rank 1 to 64 of four sets of matrices
subspaces      figures 3 and 4: how alike the directions of rank 8 and 64, and of two seeds, are
amplification  table 7: what W holds of the directions of dW
low-data       table 16: 100 rows, 1,000 rows, all of them

Two models: the bundled base on the quickstart's task (150 steps, fp32; the score is the share of held-out records whose
facts are all told), and MiniLM on TREC (two epochs, fp32; accuracy of the test set), each at one learning rate for all;
low data is MiniLM on SST-2, the rate chosen for each method and size on validation rows (all rows: glue.py's own runs).
Runs are kept in runs/bench-study and docs/study/study.json, so a stopped study goes on; several processes may share the
work.
Run: python bench/study.py [matrices ranks subspaces amplification low-data] [--models tales,minilm]; --table prints
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import shutil
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import glue
import methods
import torch
from record import record

from lorakit import AdapterState, attach, load, sites
from lorakit.core.state import Update
from lorakit.spectral.amplification import amplification
from lorakit.spectral.subspace import chance, directions, random_directions, similarities
from lorakit.spectral.svd import matrix_view, svd
from lorakit.training.base import build_empty, load_base
from lorakit.training.evaluate import evaluate
from lorakit.training.recipe import Recipe
from lorakit.training.run import train

ROOT = Path(__file__).parents[1]
WORK, PAGES = ROOT / "runs" / "bench-study", ROOT / "docs" / "study"
MATRICES = {
    "tales": {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"},
    "minilm": {"q": "query", "k": "key", "v": "value", "o": "attention.output.dense"},
}
RATES = {"tales": 5e-3, "minilm": 3e-3}
SETS = ("q", "k", "v", "o", "qk", "qv", "qkvo", "all")
BUDGET, RANKS, RANKED, SEEDS = 16, (1, 2, 4, 8, 64), ("q", "qv", "qkvo", "all"), (0, 1)
"""The rank that q alone has under the budget; the ranks of table 6, and the sets they are tried on."""
DIVERGED = 1.5
"""Nats of validation loss on TREC: guessing by the classes' shares has 1.6."""
SIZES, FEW_EPOCHS = (100, 1000, 6920), {100: 20, 1000: 6, 6920: 2}
FEW = {name: glue.METHODS[name][:2] for name in ("full", "lora-qv", "prefix")} | {
    "prefix-embedding": ({"method": "prefix-embedding"}, 3e-2)
}


def targets(model: str, letters: str) -> str | list[str]:
    """Return the recipe's targets of a set of matrices."""
    return "all-linear" if letters == "all" else [MATRICES[model][letter] for letter in letters]


def budgeted(model: str, letters: str) -> int:
    """Return the rank at which a set has about as many parameters as q alone at rank `BUDGET`."""
    named = "lorakit/tales" if model == "tales" else glue.encoder()
    skeleton = sites(build_empty(named, task="causal-lm" if model == "tales" else "classification", labels=("0", "1")))
    blocks = [site for site in skeleton.sites if site.kind == "linear" and site.path not in skeleton.heads]

    def cost(some: str) -> int:
        ends = None if some == "all" else tuple(f".{MATRICES[model][letter]}" for letter in some)
        return sum(site.out + site.in_ for site in blocks if ends is None or site.path.endswith(ends))

    return max(1, round(BUDGET * cost("q") / cost(letters)))


def recipe(model: str, letters: str, rank: int, seed: int, output: Path, slower: float = 1.0) -> Recipe:
    """Return the recipe of one run; `s = 2` at every rank."""
    adapter = {"rank": rank, "alpha": 2 * rank, "targets": targets(model, letters)}
    lr = RATES[model] / slower
    if model == "tales":
        wanted = methods.recipe("lora", lr, output, adapter)
        return wanted.model_copy(update={"train": wanted.train.model_copy(update={"seed": seed})})
    values = glue.recipe("trec", "lora-all", lr, seed, str(output)).model_dump()
    values["train"]["dtype"] = "fp32"
    return Recipe.model_validate({**values, "adapter": {"method": "lora", **adapter}})


def scored(model: str, wanted: Recipe, labels: tuple[str, ...]) -> dict[str, float]:
    """Return what a finished run scores."""
    output = Path(wanted.output)
    if model == "tales":
        return methods.scores(wanted, output, methods.write_rows())
    bare, tokenizer = load_base(wanted.model, task="classification", labels=labels)
    attach(bare, load(output / "adapter"))
    section = wanted.data.model_copy(update={"labels": labels})
    found = evaluate(bare, tokenizer, str(glue.DATA / "trec" / "test.jsonl"), section, batch_size=64).accuracy
    assert found is not None
    return {"accuracy": 100 * found}


def once(model: str, letters: str, rank: int, seed: int) -> dict[str, Any]:
    """Return the recorded run, or run and record it; one that diverged is also run at a third of the rate."""
    key = {"model": model, "set": letters, "rank": rank, "seed": seed}
    for slower in (1.0, glue.SPREAD):
        own = {**key, "slower": slower}
        found = next((r for r in known()["runs"] if all(r.get(k, 1.0) == v for k, v in own.items())), None)
        if found is None:
            output = kept(model, letters, rank, seed)
            shutil.rmtree(output, ignore_errors=True)
            wanted = recipe(model, letters, rank, seed, output, slower)
            done = train(wanted)
            found = {**own, "parameters": done.trainable_parameters, "validation_loss": done.validation_loss,
                     **scored(model, wanted, done.labels)}  # fmt: skip
            print(found, flush=True)
            note("runs", found)
        if model == "tales" or found["validation_loss"] < DIVERGED:
            break
    return found


def kept(model: str, letters: str, rank: int, seed: int) -> Path:
    """Return where a run is kept."""
    return WORK / f"{model}-{letters}-{rank}-{seed}"


def adapter(model: str, letters: str, rank: int, seed: int) -> AdapterState:
    """Return the adapter of a run, which is run anew where its folder is gone."""
    once(model, letters, rank, seed)
    output = kept(model, letters, rank, seed)
    if not (output / "adapter").is_dir():
        train(recipe(model, letters, rank, seed, output))
    return load(output / "adapter")


def few(method: str, size: int, lr: float, seed: int) -> dict[str, Any]:
    """Return the recorded run on few rows, or run and record it."""
    key = {"method": method, "rows": size, "lr": lr, "seed": seed}
    found = next((r for r in known()["few"] if all(r[k] == v for k, v in key.items())), None)
    if found is None and size == SIZES[-1] and method in glue.METHODS:
        whole = glue.once("sst2", method, lr, seed)
        found = {**key, **{name: whole[name] for name in ("parameters", "validation", "test")}}
        note("few", found)
    if found is None:
        output = WORK / f"few-{method}-{size}-{lr:.3g}-{seed}"
        shutil.rmtree(output, ignore_errors=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        rows = output.with_suffix(".jsonl")
        lines = (glue.DATA / "sst2" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0)).tolist()
        rows.write_text("".join(lines[i] for i in order[:size]), encoding="utf-8")
        values = glue.recipe("sst2", "full", lr, seed, str(output)).model_dump()
        values["adapter"] = FEW[method][0]
        values["data"]["train"] = str(rows)
        values["train"] |= {"epochs": FEW_EPOCHS[size], "evaluate_every": 10**6}
        done = train(Recipe.model_validate(values))
        model, tokenizer = load_base(glue.encoder(), task="classification", labels=done.labels)
        attach(model, load(done.adapter_dir))
        section = Recipe.model_validate(values).data.model_copy(update={"labels": done.labels})
        scores = {
            part: evaluate(model, tokenizer, str(glue.DATA / "sst2" / f"{part}.jsonl"), section, batch_size=64).accuracy
            for part in ("validation", "test")
        }
        found = {**key, "parameters": done.trainable_parameters,
                 **{part: round(100 * (score or 0.0), 2) for part, score in scores.items()}}  # fmt: skip
        shutil.rmtree(output)
        print(found, flush=True)
        note("few", found)
    return found


def low_data(method: str, size: int) -> None:
    """Choose the rate of a method at a size on the validation rows, then run every seed."""
    best = glue.best_rate(FEW[method][1], lambda lr: few(method, size, lr, glue.SEEDS[0])["validation"])
    for seed in glue.SEEDS:
        few(method, size, best, seed)


def middle(state: AdapterState, model: str, letter: str) -> Update:
    """Return the update of a matrix in the middle layer, as the paper shows the 48th of 96."""
    own = [update for update in state.updates if update.site.path.endswith(f".{MATRICES[model][letter]}")]
    return own[(len(own) - 1) // 2]


def subspaces(model: str) -> Iterator[dict[str, Any]]:
    """Yield the grids of figures 3 and 4, of the input directions of q and v in the middle layer, a line a row."""
    eight, sixty, other = (adapter(model, "qv", rank, seed) for rank, seed in ((8, 0), (64, 0), (64, 1)))
    for letter in "qv":
        small, large, again = (directions(middle(s, model, letter).tensors["down"]) for s in (eight, sixty, other))
        n = large.shape[1]
        noise = [random_directions(64, n, torch.Generator().manual_seed(i)) for i in range(2)]
        for name, one, two in (("r8-r64", small, large), ("seeds", large, again), ("random", *noise)):
            grid = similarities(one, two)
            yield {"model": model, "matrix": letter, "grid": name, "width": n,
                   "values": [" ".join(f"{value:.3f}" for value in row) for row in grid.tolist()],
                   "first": round(float(grid[0, 0]), 3), "chance_of_first": round(chance(1, 1, n), 4)}  # fmt: skip


def amplified(model: str) -> Iterator[dict[str, Any]]:
    """Yield table 7 of the middle layer's q at rank 4 and 64."""
    named = "lorakit/tales" if model == "tales" else glue.encoder()
    labels = tuple("012345") if model == "minilm" else ()
    bare, _ = load_base(named, task="classification" if labels else "causal-lm", labels=labels)
    for rank in (4, 64):
        update = middle(adapter(model, "qv", rank, 0), model, "q")
        own = svd(update)
        weight = matrix_view(update.site, bare.get_submodule(update.site.path).weight.detach())
        for count in sorted({min(4, own.rank), own.rank}):
            held = amplification(own, weight, count)
            yield {"model": model, "rank": rank, "directions": count, "factor": held.factor, "of_dW": held.update,
                   "of_W": held.weight, "random": held.random, "dW": held.update_norm,
                   "W": held.weight_norm}  # fmt: skip


def known() -> dict[str, Any]:
    """Return everything that was found."""
    file = PAGES / "study.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    return {"runs": [], "few": [], "subspaces": [], "amplification": [], **found}


def note(part: str, *found: Mapping[str, Any]) -> None:
    """Add what was found; one process at a time."""
    WORK.mkdir(parents=True, exist_ok=True)
    with (WORK / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        so_far = known()
        so_far[part] = [*so_far[part], *found]
        kinds = {name: so_far[name] for name in ("runs", "few", "subspaces", "amplification")}
        made = record("study", (__doc__ or "").splitlines()[0], glue.PACKAGES, rates=RATES, budget=BUDGET, **kinds)
        PAGES.mkdir(exist_ok=True)
        shutil.move(made, PAGES / "study.json")


def runs_of(part: str, model: str) -> Iterator[tuple[str, int, int]]:
    """Yield set, rank and seed of what a part runs."""
    if part == "matrices":
        yield from ((letters, budgeted(model, letters), seed) for letters in SETS for seed in SEEDS)
    if part == "ranks":
        yield from ((letters, rank, 0) for letters in RANKED for rank in RANKS)


def percent(run: Mapping[str, Any]) -> float:
    """Return the score of a run."""
    return 100 * run["told"] if "told" in run else float(run["accuracy"])


def table(part: str, model: str) -> str:
    """Return what is known of a part as Markdown."""
    found, score = known()["runs"], {"tales": "told", "minilm": "accuracy"}[model]
    if part == "matrices":
        lines = [f"| {model}: adapted | rank | parameters | {score}, each seed | mean |", "|---|---|---|---|---|"]
        for letters in SETS:
            rank = budgeted(model, letters)
            own = [r for r in found if (r["model"], r["set"], r["rank"]) == (model, letters, rank)]
            if own:
                values = [percent(r) for r in own]
                shown = ", ".join(f"{value:.1f}" for value in values)
                lines.append(
                    f"| {letters} | {rank} | {own[0]['parameters']:,} | {shown} | {statistics.mean(values):.1f} |"
                )
        return "\n".join(lines)
    lines = [
        f"| {model}: adapted | " + " | ".join(f"r = {rank}" for rank in RANKS) + " |",
        "|---" * (1 + len(RANKS)) + "|",
    ]
    for letters in RANKED:
        cells = []
        for rank in RANKS:
            key = (model, letters, rank, 0)
            own = [percent(r) for r in found if (r["model"], r["set"], r["rank"], r["seed"]) == key]
            cells.append(", slower: ".join(f"{value:.1f}" for value in own))
        lines.append(f"| {letters} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def few_table() -> str:
    """Return the scores on few rows as Markdown: medians of the seeds and their range."""
    lines = ["| method | " + " | ".join(f"{size:,} rows" for size in SIZES) + " |", "|---" * (1 + len(SIZES)) + "|"]
    for method in FEW:
        cells = []
        for size in SIZES:
            own = [r for r in known()["few"] if (r["method"], r["rows"]) == (method, size)]
            rates = {r["lr"]: sorted(s["test"] for s in own if s["lr"] == r["lr"]) for r in own}
            best = next((scores for scores in rates.values() if len(scores) == len(glue.SEEDS)), None)
            cells.append("" if best is None else f"{statistics.median(best):.1f} ({best[0]:.1f} to {best[-1]:.1f})")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = ("matrices", "ranks", "subspaces", "amplification", "low-data")
    options.add_argument("parts", nargs="*", default=[], choices=(*parts, []), help="all of them by default")
    options.add_argument("--models", default="tales,minilm")
    options.add_argument("--table", action="store_true", help="print what is known as Markdown, and run nothing")
    given = options.parse_args()
    if given.table:
        both = [table(part, model) for part in ("matrices", "ranks") for model in MATRICES]
        print("\n\n".join([*both, few_table()]))
        return
    torch.set_num_threads(1)
    methods.write_rows()
    for part in given.parts or parts:
        if part == "low-data":
            for size, method in itertools.product(SIZES, FEW):
                low_data(method, size)
            continue
        for model in given.models.split(","):
            for letters, rank, seed in runs_of(part, model):
                once(model, letters, rank, seed)
            if part in ("subspaces", "amplification") and not any(one["model"] == model for one in known()[part]):
                note(part, *(subspaces if part == "subspaces" else amplified)(model))


if __name__ == "__main__":
    main()
