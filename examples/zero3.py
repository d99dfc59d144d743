"""DeepSpeed's ZeRO-3 around an attached adapter: weights, gradients and moments are all divided among the processes.

    pip install 'lorakit[train]' deepspeed
    torchrun --nproc-per-node 8 examples/zero3.py FOLDER_FOR_THE_ADAPTER --base DIR --data rows.jsonl [--dtype bf16]

No process ever holds the whole base: each keeps its share as it loads. What starts from the weights (DoRA, PiSSA) is
refused there. The loop is DeepSpeed's: nothing is fused, and schedules of ranks or corrections of gradients do not act,
as they do in `lorakit train` with `train.parallel: fsdp`. DS_ACCELERATOR=cpu lets it run where no GPU is.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lorakit import AdapterSpec, LoRA, attach, save, state
from lorakit.data import Collator, prepare
from lorakit.training.base import load_base, quiet


def settings(batch: int, dtype: str, clip: float) -> dict[str, Any]:
    """Return what DeepSpeed is told, `batch` rows a process and step."""
    return {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_clipping": clip,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW, which needs no compiler
    }


def learn(
    base: str, data: str | Iterable[Mapping[str, str]], spec: AdapterSpec, output: Path, *, steps: int = 40,
    batch: int = 4, lr: float = 2e-3, dtype: str = "fp32", clip: float = 1.0, seed: int = 0,
) -> list[float]:  # fmt: skip
    """Train an adapter, write it to `output`, and return the loss of every step, in nats per completion token."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.init_distributed()
    told = settings(batch, dtype, clip)
    dividing = HfDeepSpeedConfig(told)  # while it lives, transformers divides what it loads
    model, tokenizer = load_base(base, dtype=dtype)
    handle = attach(model, spec)
    if dtype == "bf16":
        model.bfloat16()  # DeepSpeed keeps fp32 copies of what learns
    optimizer = torch.optim.AdamW(handle.parameters(), lr)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=told)
    del dividing
    with quiet():
        rows = prepare(data, tokenizer, max_length=128).dataset
    collate, here, several = Collator(tokenizer.pad_token_id), dist.get_rank(), dist.get_world_size()
    drawn = torch.Generator().manual_seed(seed)
    found, order = [], list[int]()
    for _ in range(steps):
        while len(order) < batch * several:
            order += torch.randperm(len(rows), generator=drawn).tolist()
        mine, order = order[: batch * several][here::several], order[batch * several :]
        inputs = {name: values.to(engine.device) for name, values in collate([rows[i] for i in mine]).items()}
        own = (inputs["labels"][:, 1:] != -100).sum()
        dist.all_reduce(tokens := own.clone())
        share = engine(**inputs).loss * own / tokens
        engine.backward(share * several)  # DeepSpeed takes the mean over processes
        engine.step()
        dist.all_reduce(loss := share.detach())
        found.append(float(loss))
    with deepspeed.zero.GatheredParameters(handle.read_by_state()):
        if here == 0:
            save(state(model), output)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    counting = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(64)]
    parser.add_argument("output", type=Path)
    parser.add_argument("--base", default="lorakit/tales")
    parser.add_argument("--data", default=counting)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    adapter = AdapterSpec(LoRA(rank=8, alpha=16))
    losses = learn(given.base, given.data, adapter, given.output, steps=given.steps, dtype=given.dtype)
    if dist.get_rank() == 0:
        print(*(f"step {step:3}  loss {loss:.4f}" for step, loss in enumerate(losses, 1)), sep="\n")
    dist.destroy_process_group()
