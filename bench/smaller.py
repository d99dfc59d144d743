"""How small can an adapter become before its score suffers?

Three LoRAs of rank 16 and more are trained here: the quickstart's (told: the share of held-out records whose facts are
all told), one on E2E (perplexity and BLEU of the test set) and one of MiniLM on SST-2 (accuracy of the test set). Each
is compressed to shares of its bytes, shared out among its weights by size of their singular values, as it is kept and
in 8 bits, and scored. Runs are kept in runs/bench-smaller, so a stopped bench goes on; docs/results/smaller.json is
written after each adapter.
Run: python bench/smaller.py [quickstart] [e2e] [sst2]; --table prints what is known
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import e2e
import glue
import methods
import torch
from record import RESULTS, record

from lorakit import AdapterState, attach, detach, load
from lorakit.cli.quickstart import measure
from lorakit.combining import compress
from lorakit.combining.compress import stored_bytes
from lorakit.errors import CombineError
from lorakit.training.base import load_base
from lorakit.training.evaluate import evaluate
from lorakit.training.recipe import Recipe
from lorakit.training.run import train

WORK = Path(__file__).parents[1] / "runs" / "bench-smaller"
SHARES = {None: (0.75, 0.5, 0.35, 0.25, 0.12, 0.06, 0.03), "int8": (0.25, 0.12, 0.06, 0.03, 0.015), "fp8": (0.25, 0.12)}
"""Of the bytes the adapter has, by what its numbers are kept in; a quarter is every direction in 8 bits."""
Scored = Mapping[str, float]


def quickstart() -> tuple[Recipe, Callable[[Any, Any], Scored]]:
    """Return the quickstart's recipe, and what its adapter tells."""
    task = methods.write_rows()
    wanted = methods.recipe("lora", 5e-3, WORK / "quickstart")

    def scored(model: Any, tokenizer: Any) -> Scored:
        (WORK / "quickstart" / "data").mkdir(exist_ok=True)
        rows = (methods.WORK / "data" / "held-out.jsonl").read_bytes()
        (WORK / "quickstart" / "data" / "held-out.jsonl").write_bytes(rows)
        found = measure(model, tokenizer, wanted, task)
        return {"told": 100 * found.told, "perplexity": found.perplexity}

    return wanted, scored


def on_e2e() -> tuple[Recipe, Callable[[Any, Any], Scored]]:
    """Return the recipe of examples/e2e.yaml, and the test set's perplexity and BLEU."""
    wanted = e2e.recipe(1e-3, WORK / "e2e")

    def scored(model: Any, tokenizer: Any) -> Scored:
        rows = str(e2e.DATA / "test.jsonl")
        found = evaluate(model, tokenizer, rows, wanted.data, batch_size=64, bleu=True, max_new_tokens=80)
        assert found.perplexity is not None
        assert found.bleu is not None
        return {"perplexity": found.perplexity, "bleu": found.bleu}

    return wanted, scored


def on_sst2() -> tuple[Recipe, Callable[[Any, Any], Scored]]:
    """Return the recipe of the study of small adapters, and the test set's accuracy."""
    wanted = glue.recipe("sst2", "lora-all", 1e-3, 0, str(WORK / "sst2"))

    def scored(model: Any, tokenizer: Any) -> Scored:
        section = wanted.data.model_copy(update={"labels": ("0", "1")})
        found = evaluate(model, tokenizer, str(glue.DATA / "sst2" / "test.jsonl"), section, batch_size=64).accuracy
        assert found is not None
        return {"accuracy": 100 * found}

    return wanted, scored


ADAPTERS = {"quickstart": quickstart, "e2e": on_e2e, "sst2": on_sst2}


def curve(name: str) -> dict[str, Any]:
    """Train one adapter, or take the finished one; return what it scores at every size."""
    wanted, scored = ADAPTERS[name]()
    output = Path(wanted.output)
    done = train(wanted, resume=(output / "events.jsonl").exists())
    state = load(done.adapter_dir)
    labels = done.labels
    model, tokenizer = load_base(wanted.model, task="classification" if labels else "causal-lm", labels=labels)

    def score(form: AdapterState) -> dict[str, float]:
        attach(model, form, "form")
        found = {key: round(value, 4) for key, value in scored(model, tokenizer).items()}
        detach(model, "form")
        return found

    whole = stored_bytes(state)
    points = [{"dtype": None, "share": 1.0, "bytes": whole, "error": 0.0, **score(state)}]
    for dtype, shares in SHARES.items():
        for share in shares:
            try:
                made = compress(state, size=round(share * whole) + 1, dtype=dtype)
            except CombineError:  # what was trained whole is more than that
                continue
            size = {"dtype": dtype, "share": round(made.bytes / whole, 4), "bytes": made.bytes}
            points.append(
                {**size, "error": round(made.error, 4), "ranks": sum(made.ranks.values()), **score(made.state)}
            )
            print(name, points[-1], flush=True)
    trained = sum(tensor.nbytes for tensor in state.trained.values())
    return {"adapter": name, "spec": state.spec.to_json(), "trained_whole_bytes": trained, "points": points}


def known() -> list[dict[str, Any]]:
    file = RESULTS / "smaller.json"
    return json.loads(file.read_text())["curves"] if file.exists() else []


def table() -> str:
    """Return the curves as Markdown."""
    parts = []
    for found in known():
        scores = [key for key in found["points"][0] if key not in ("dtype", "share", "bytes", "error", "ranks")]
        lines = [
            f"| {found['adapter']} | of its bytes | error | {' | '.join(scores)} |",
            "|---|---|---|" + "---|" * len(scores),
        ]
        for point in found["points"]:
            numbers = " | ".join(f"{point[key]:.4g}" for key in scores)
            lines.append(f"| {point['dtype'] or 'fp32'} | {point['share']:.1%} | {point['error']:.1%} | {numbers} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main() -> None:
    asked = [name for name in sys.argv[1:] if not name.startswith("--")] or list(ADAPTERS)
    if "--table" in sys.argv:
        print(table())
        return
    torch.set_num_threads(1)
    for name in asked:
        found = curve(name)
        curves = [one for one in known() if one["adapter"] != name] + [found]
        record("smaller", (__doc__ or "").splitlines()[0], ("torch", "transformers"), curves=curves)
    print(table())


if __name__ == "__main__":
    main()
