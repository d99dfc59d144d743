"""What does the loss of a long vocabulary cost beside the hidden states it is made of, in memory and in time?

Vocabulary 64,000, 2,048 tokens of width 1,024, every other one masked; forward and backward to the hidden states,
the head frozen, fp32 and bf16. Each way in a process of its own, whose peak (VmHWM) is held against what it held
before; the ways take turns, and medians count. `full logits` is transformers' loss: the logits whole, in fp32. `chunks`
is torchtune's linear cross-entropy: masked rows dropped, eight chunks, autograd keeps each. `lorakit` is ours.
Run: python bench/cross_entropy.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from record import peak_bytes, record
from torch import Tensor

VOCABULARY, TOKENS, WIDTH, MASKED = 64_000, 2_048, 1_024, -100
REPEATS = 3
BAR = 0.05


def full(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the loss as transformers computes it."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum", ignore_index=MASKED)


def chunks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the loss as torchtune computes it."""
    kept = (labels != MASKED).nonzero().squeeze(1)
    parts = zip(hidden[kept].chunk(8), labels[kept].chunk(8), strict=True)
    return torch.stack([F.cross_entropy(F.linear(h, weight).float(), y, reduction="sum") for h, y in parts]).sum()


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the loss as lorakit computes it."""
    from lorakit.kernels.linear_cross_entropy import linear_cross_entropy

    rows = (labels != MASKED).nonzero().squeeze(1)
    return linear_cross_entropy(hidden, weight, None, rows, labels[rows])


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"full logits": full, "chunks": chunks, "lorakit": ours}


def one(way: str, dtype: str) -> None:
    """Compute the loss once in this process and print what it cost and what came out."""
    torch.manual_seed(0)
    kind: torch.dtype = getattr(torch, dtype)
    WAYS[way](*inputs(2, 8, 4, kind)).backward()  # type: ignore[no-untyped-call]  # whatever torch loads by the way
    hidden, weight, labels = inputs(TOKENS, VOCABULARY, WIDTH, kind)
    held, began, busy = peak_bytes(), time.perf_counter(), time.process_time()
    loss = WAYS[way](hidden, weight, labels)
    loss.backward()  # type: ignore[no-untyped-call]
    found = {"seconds": time.perf_counter() - began, "busy_seconds": time.process_time() - busy}
    assert hidden.grad is not None
    norm = hidden.grad.double().norm().item()
    assert norm > 0
    print(json.dumps({**found, "extra_bytes": peak_bytes() - held, "loss": loss.item(), "gradient_norm": norm}))


def inputs(tokens: int, vocabulary: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, a head and labels, every other one masked, without a wider copy of any."""
    hidden = torch.randn(tokens, width, dtype=dtype).requires_grad_()
    weight, labels = torch.empty(vocabulary, width, dtype=dtype).normal_(0, 0.02), torch.randint(vocabulary, (tokens,))
    labels[::2] = MASKED
    return hidden, weight, labels


def measured(dtype: str) -> list[dict[str, Any]]:
    """Return the median costs of every way, which took turns, and check that all computed the same."""
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(REPEATS):
        for way, found in runs.items():
            command = [sys.executable, __file__, "--one", way, dtype]
            answer = subprocess.run(command, check=True, capture_output=True, text=True)
            found.append(json.loads(answer.stdout.splitlines()[-1]))
            print(dtype, way, found[-1], flush=True)
    middle = {
        way: {key: statistics.median(run[key] for run in found) for key in found[0]} for way, found in runs.items()
    }
    whole = middle["full logits"]
    for found in middle.values():
        for key in ("loss", "gradient_norm"):
            assert abs(found[key] / whole[key] - 1) < (1e-5 if dtype == "float32" else 1e-2), (dtype, key, found)
    return [
        {
            "dtype": dtype,
            "way": way,
            **found,
            "memory_ratio": round(found["extra_bytes"] / whole["extra_bytes"], 4),
            "time_ratio": round(found["busy_seconds"] / whole["busy_seconds"], 3),
            "spread_busy_seconds": [
                min(r["busy_seconds"] for r in runs[way]),
                max(r["busy_seconds"] for r in runs[way]),
            ],
        }
        for way, found in middle.items()
    ]


def main() -> None:
    """Measure, write docs/results/cross-entropy.json, and say whether the bar is met."""
    if sys.argv[1:2] == ["--one"]:
        one(*sys.argv[2:])
        return
    found = [row for dtype in ("float32", "bfloat16") for row in measured(dtype)]
    record(
        "cross-entropy", (__doc__ or "").splitlines()[0], ("torch",), threads=torch.get_num_threads(),
        vocabulary=VOCABULARY, tokens=TOKENS, width=WIDTH, masked=0.5, runs=found,
    )  # fmt: skip
    for row in found:
        if row["way"] == "lorakit":
            print(f"{row['dtype']}: {row['memory_ratio']:.2%} of the full logits' memory, bar {BAR:.0%}")


if __name__ == "__main__":
    main()
