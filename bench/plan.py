"""Is a step as large as the plan says? Random models, every kind of step, measured by torch's own allocator.

The forecast sees shapes alone. The measurement is a real second step on the CPU under torch's profiler, which reports
each allocation and release: their highest sum, with the tensors that were there before. `saved` is what autograd keeps
between forward and backward, counted by saved_tensors_hooks (each storage once, parameters left out).
`time`: the quickstart's task is calibrated, then trained whole, for three seeds. `speed`: plans of large shapes, each
in a process of its own, with its peak memory.
Run: python bench/plan.py [memory] [time] [speed]
"""

from __future__ import annotations

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
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lorakit.core.spec import AdapterSpec
from lorakit.training.forecast import Load, forecast, scene
from lorakit.training.quantised import QuantSection, pack_layers
from lorakit.training.recipe import make_recipe
from lorakit.training.rehearsal import Scene

BF16 = torch.bfloat16
MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(vocab_size=8000, hidden_size=512, intermediate_size=1376, num_hidden_layers=6,
                    num_attention_heads=8, num_key_value_heads=4),
    ),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=12000, n_embd=384, n_layer=5, n_head=6, resid_pdrop=0.0,
                                         embd_pdrop=0.0, attn_pdrop=0.0)),
    "bert": (
        BertForSequenceClassification,
        BertConfig(vocab_size=12000, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
                   intermediate_size=1536, num_labels=4),
    ),
}  # fmt: skip
SECONDS = ("call_seconds", "since_imports")
CASES: dict[str, tuple[str, dict[str, Any], Load]] = {
    "llama, lora": ("llama", {}, Load(4, 256)),
    "llama, lora, bf16": ("llama", {}, Load(4, 256, dtype=BF16)),
    "llama, lora, one long row": ("llama", {}, Load(1, 1024)),
    "llama, lora, packed": ("llama", {}, Load(2, 512, packed=True)),
    "llama, lora, checkpointing": ("llama", {}, Load(4, 256, checkpointing=True)),
    "llama, lora, checkpointing, bf16": ("llama", {}, Load(8, 256, checkpointing=True, dtype=BF16)),
    "llama, lora, dropout 0.1": ("llama", {"dropout": 0.1}, Load(4, 256)),
    "llama, lora, 4-bit": ("llama", {}, Load(4, 256, dtype=BF16, quant=QuantSection())),
    "llama, lora, 4-bit, checkpointing": (
        "llama", {}, Load(4, 256, dtype=BF16, quant=QuantSection(), checkpointing=True)),
    "llama, dora": ("llama", {"method": "dora"}, Load(4, 256)),
    "llama, adalora": ("llama", {"method": "adalora"}, Load(4, 256)),
    "llama, ia3": ("llama", {"method": "ia3"}, Load(4, 256)),
    "llama, full": ("llama", {"method": "none", "train": "*"}, Load(4, 256)),
    "llama, full, bf16": ("llama", {"method": "none", "train": "*"}, Load(4, 256, dtype=BF16)),
    "gpt2, lora": ("gpt2", {}, Load(8, 128)),
    "gpt2, vera": ("gpt2", {"method": "vera"}, Load(8, 128)),
    "gpt2, full": ("gpt2", {"method": "none", "train": "*"}, Load(8, 128)),
    "bert, lora": ("bert", {"train": "heads"}, Load(32, 64, classes=True)),
    "bert, lora, bf16": ("bert", {"train": "heads"}, Load(32, 64, classes=True, dtype=BF16)),
    "bert, houlsby": ("bert", {"method": "houlsby", "train": "heads"}, Load(32, 64, classes=True)),
}  # fmt: skip


def spec_of(adapter: dict[str, Any]) -> AdapterSpec:
    """Return the adapter of a case, as a recipe says it."""
    return make_recipe({"adapter": adapter}).adapter.spec(seed=0, depth=6)


def measured(made: Scene) -> tuple[int, int]:
    """Return the bytes of a real step at its fullest, and what autograd saved."""
    torch.manual_seed(0)
    model = made.build()
    made.prepare(model)
    optimizer, rows = made.optimizer(model), made.batch()
    model.train()

    def step() -> None:
        with made.forward():
            loss = made.loss(model, rows)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    step()
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    there = [*model.parameters(), *model.buffers(), *made.extra(model), *states]
    before = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in there}.values())
    saved = kept(made, model, rows, there)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(file))
        events = [e for e in json.loads(file.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        most = max(most, now)
    return before + most, saved


def kept(made: Scene, model: nn.Module, rows: dict[str, Tensor], there: list[Tensor]) -> int:
    """Return the bytes autograd saves in one forward."""
    own = {t.untyped_storage().data_ptr() for t in there}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), made.forward():
        loss = made.loss(model, rows)
    del loss
    return sum(storages.values())


def case(name: str) -> dict[str, Any]:
    """Forecast one step and measure it."""
    which, adapter, load = CASES[name]
    cls, config = MODELS[which]
    with torch.device("meta"):
        model = cls(config)
    spec = spec_of(adapter)
    planned = forecast(model, spec, load)
    real, saved = measured(scene(model, spec, load, pack=pack_layers))
    own = planned.between.activations + planned.between.logits
    return {
        "case": name,
        "forecast": planned.step.total,
        "measured": real,
        "error": round(planned.step.total / real - 1, 4),
        "saved_forecast": own,
        "saved": saved,
        "saved_error": None if load.checkpointing else round(own / saved - 1, 4),
        "parts": vars(planned.step),
    }


def memory() -> list[dict[str, Any]]:
    """Forecast and measure every case."""
    torch.set_num_threads(1)
    found = []
    for name in CASES:
        found.append(case(name))
        told = found[-1]
        share = "" if told["saved_error"] is None else f"{told['saved_error']:+.1%}"
        sizes = [f"{told[key] / 1e6:8.1f}" for key in ("forecast", "measured", "saved_forecast", "saved")]
        print(f"{name:34}", *sizes[:2], f"MB {told['error']:+.1%}   saved", *sizes[2:], "MB", share, flush=True)
    return found


def times() -> list[dict[str, Any]]:
    """Calibrate the quickstart's run, then train it, and compare the seconds."""
    import methods

    from lorakit.training.calibration import calibrate
    from lorakit.training.run import train

    methods.write_rows()
    found = []
    for seed in range(3):
        with tempfile.TemporaryDirectory() as folder:
            recipe = methods.recipe("lora", 5e-3, Path(folder) / "run")
            recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": seed})})
            planned = calibrate(recipe).duration
            took = train(recipe).seconds
        found.append({"seed": seed, "forecast": round(planned.seconds, 1), "fastest": round(planned.fastest, 1),
                      "slowest": round(planned.slowest, 1), "took": round(took, 1),
                      "error": round(planned.seconds / took - 1, 3)})  # fmt: skip
        print(found[-1], flush=True)
    return found


def speeds() -> list[dict[str, Any]]:
    """Return how long plans of large shapes take, the median of five processes, and their largest peak memory."""
    found = []
    for shape in ("llama-2-7b", "llama-2-70b", "gpt3-175b"):
        command = [sys.executable, __file__, "--one", shape]
        answers = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(5)]
        runs = [json.loads(answer.splitlines()[-1]) for answer in answers]
        told: dict[str, Any] = {name: statistics.median(run[name] for run in runs) for name in SECONDS}
        told["range"] = [pick(run["call_seconds"] for run in runs) for pick in (min, max)]
        found.append({"shape": shape, **told, "peak": max(run["peak"] for run in runs)})
        print(found[-1], flush=True)
    return found


def one(name: str) -> None:
    """Plan one shape and print how long it took since the process began, and the memory of the process."""
    began = time.perf_counter()
    from lorakit.inject.skeleton import config_of, on_meta
    from lorakit.planning.shapes import shape
    from lorakit.training.plan import plan

    model = on_meta(config_of(shape(name)), "causal-lm")
    recipe = make_recipe({"model": name, "train": {"dtype": "bf16"}})
    start = time.perf_counter()
    plan(recipe, model=model)
    ended = time.perf_counter()

    peak = peak_bytes()
    print(json.dumps({"call_seconds": round(ended - start, 2), "since_imports": round(ended - began, 2), "peak": peak}))


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2])
        return
    file = RESULTS / "plan.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    found = {name: found[name] for name in ("memory", "time", "speed") if name in found}
    for name in sys.argv[1:] or ("memory", "time", "speed"):
        found[name] = {"memory": memory, "time": times, "speed": speeds}[name]()
        record("plan", (__doc__ or "").splitlines()[0], ("torch", "transformers"), **found)


if __name__ == "__main__":
    main()
