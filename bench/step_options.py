"""What do the ways to run a step cost and save: fused, compiled, both, with some blocks or all of them recomputed?

Two shapes with LoRA of rank 16 on every linear layer, 512 tokens, fp32: the bundled base, and a Llama of width 768. All
ways run in turn in one process, round by round, forward and backward; the ratios are medians over rounds of that to
`plain` within one. Kept is what torch's allocator holds more after the forward than before it, peak the most it
held. With one thread the time is the processor's.
Run: python bench/step_options.py [--threads 1] [--rounds 9] [--keep]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from record import record
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from train_step import VOCABULARY, Step, base, falls, ours

from lorakit.training.step import compile_blocks, recompute, uncompiled

ROWS, LENGTH = 2, 256


def way(model: Any, fused: bool = False, compiled: bool = False, recomputed: bool | float = False) -> Any:
    """Return a model with its adapter that runs steps in one way."""
    torch.manual_seed(1)
    ours(model, "lora", fused=fused)
    recompute(model, recomputed)
    if compiled:
        compile_blocks(model, dynamic=False)
    return model


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fused": {"fused": True},
    "compiled": {"compiled": True},
    "fused and compiled": {"fused": True, "compiled": True},
    "fused, half of the blocks recomputed": {"fused": True, "recomputed": 0.5},
    "fused, all recomputed": {"fused": True, "recomputed": True},
    "compiled, all recomputed": {"compiled": True, "recomputed": True},
}


def tales() -> Any:
    """Return the bundled base."""
    from transformers import AutoModelForCausalLM

    from lorakit.training.base import ASSETS

    model = AutoModelForCausalLM.from_pretrained(ASSETS / "tales", dtype=torch.float32)
    model.config.use_cache = False
    return model.requires_grad_(False).train()


SHAPES: dict[str, Callable[[], Any]] = {
    "bundled base, 8 blocks of width 256": tales,
    "Llama, 2 blocks of width 768": lambda: base("llama", torch.float32, 2),
}


def held(step: Step) -> tuple[float, float]:
    """Return the MB that a forward left behind, and the most that forward and backward held."""
    step.model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as forward:
        loss = step.forward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as backward:
        loss.backward()  # type: ignore[no-untyped-call]
    kept, most = 0, 0
    now = 0
    for part in (forward, backward):
        for event in part.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        kept = kept or now
    return kept / 1e6, most / 1e6


def study(make: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Return each way's time, kept and peak bytes, over the plain one's."""
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    bare, steps, warm = make(), {}, {}
    wanted: list[Tensor] = []
    for name, options in WAYS.items():
        began = time.process_time()
        step = steps[name] = Step(way(copy.deepcopy(bare), **options), False, ids)
        step.seconds()
        warm[name] = time.process_time() - began
        grads = [p.grad.clone() for p in step.model.parameters() if p.grad is not None]
        wanted = wanted or grads
        apart = max(float((a - b).norm() / b.norm()) for a, b in zip(grads, wanted, strict=True))
        assert apart < 1e-5, f"{name}: gradients are {apart:.1e} apart"
        step.seconds()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(step.seconds())
    memory = {name: held(step) for name, step in steps.items()}
    with uncompiled():
        assert all(falls(step) for step in steps.values()), "a loss does not fall"
    found: dict[str, Any] = {"plain_ms": round(1e3 * statistics.median(times["plain"]), 1),
                             "plain_kept_mb": memory["plain"][0], "plain_peak_mb": memory["plain"][1]}  # fmt: skip
    for name in WAYS:
        ratios = [mine / plain for mine, plain in zip(times[name], times["plain"], strict=True)]
        found[name] = {
            "time": round(statistics.median(ratios), 3),
            "range": [round(min(ratios), 3), round(max(ratios), 3)],
            "kept": round(memory[name][0] / memory["plain"][0], 3),
            "peak": round(memory[name][1] / memory["plain"][1], 3),
            "first_step_seconds": round(warm[name], 1),
        }
        print(f"{name:38} {found[name]}", flush=True)
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--keep", action="store_true", help="write docs/results/step-options.json")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")
    torch._dynamo.config.recompile_limit = 64  # several compiled models in one process
    found = {name: study(make, given.rounds) for name, make in SHAPES.items()}
    if given.keep:
        record("step-options", "What do the ways to run a step cost and save?", ("torch", "transformers"),
               threads=given.threads, rounds=given.rounds, rows=ROWS, length=LENGTH, shapes=found)  # fmt: skip


if __name__ == "__main__":
    main()
