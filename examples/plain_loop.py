"""The plain loop: everything `lorakit train` does to a model, without the Trainer, in one screen.

    python examples/plain_loop.py [data.jsonl] [--base lorakit/tales]

AdamW over groups by role, cosine with warm-up, clipping. The tests hold `lorakit train` to it, loss by loss.
"""

import argparse
import math
from collections.abc import Iterable, Mapping

import torch

from lorakit import AdapterSpec, LoRA, attach, param_groups
from lorakit.data import Collator, prepare
from lorakit.errors import LorakitError
from lorakit.training.base import load_base, quiet


def losses(
    base: str, data: str | Iterable[Mapping[str, str]], spec: AdapterSpec, *, steps: int = 40, batch: int = 8,
    lr: float = 2e-3, up_ratio: float = 1.0, warmup: float = 0.1, clip: float = 1.0, seed: int = 0,
) -> list[float]:  # fmt: skip
    """Train an adapter on `base` and return the loss of every step, in nats per completion token."""
    model, tokenizer = load_base(base)
    with quiet():
        rows = prepare(data, tokenizer, max_length=128).dataset
    collate = Collator(tokenizer.pad_token_id)
    parameters = attach(model, spec).parameters()
    optimizer = torch.optim.AdamW(param_groups(model, lr, up_ratio))
    warm = int(warmup * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: t / warm if t < warm else (1 + math.cos(math.pi * (t - warm) / (steps - warm))) / 2
    )
    model.train()
    found, order, epoch = [], [], 0
    for _ in range(steps):
        if not order:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
            if epoch == 0:  # memory that does not suffice shows at once
                longest = sorted(order, key=lambda i: -len(rows[i]["input_ids"]))[:batch]
                order = longest + [i for i in order if i not in longest]
            epoch += 1
        chosen, order = order[:batch], order[batch:]
        loss = model(**{k: v.to(model.device) for k, v in collate([rows[i] for i in chosen]).items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    counting = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(64)]
    parser.add_argument("data", nargs="?", default=counting)
    parser.add_argument("--base", default="lorakit/tales")
    given = parser.parse_args()
    try:
        found = losses(given.base, given.data, AdapterSpec(LoRA(rank=8, alpha=16)))
    except LorakitError as error:
        parser.error(str(error))
    print("\n".join(f"step {step:3}  loss {loss:.4f}" for step, loss in enumerate(found, 1)))
