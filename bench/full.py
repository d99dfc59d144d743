"""Full fine-tuning on a prepared stage: the baseline every low-rank method is measured against.

Same rows, same batches in the same order, same schedule, clipping and number of steps as `lorakit.train`; the only
difference is what moves.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from lorakit.data import Collator
from lorakit.training.loss import summed_loss
from lorakit.training.order import Shuffled, row_lengths
from lorakit.training.stage import Stage


def full_fine_tuning(stage: Stage, lr: float, steps: int, *, seed: int = 0, warmup: float = 0.03) -> float:
    """Train every parameter of the stage's model in place; return the seconds it took."""
    model = stage.model.train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(warmup * steps), steps)
    began = time.perf_counter()
    for _, batch in zip(range(steps), _batches(stage, seed), strict=False):
        labels = batch.pop("labels")
        loss, trained = summed_loss(model(**batch).logits, labels)
        (loss / trained).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return time.perf_counter() - began


def _batches(stage: Stage, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield the batches of epoch after epoch, in the order the Trainer sees them."""
    order = Shuffled(row_lengths(stage.train.dataset), seed, stage.batch_rows)
    collate, epoch = Collator(stage.tokenizer.pad_token_id), 0
    while True:
        order.set_epoch(epoch)
        rows = list(order)
        for start in range(0, len(rows), stage.batch_rows):
            yield collate([stage.train.dataset[i] for i in rows[start : start + stage.batch_rows]])
        epoch += 1
