"""The one loss of training and evaluation: a sum over trained tokens (or rows), and how many they are.

A mean per micro-batch, averaged over micro-batches, weighs a token by the company it keeps; two numbers that are
added up do not. Whoever needs a mean divides at the end, once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.core.hollow import is_hollow
from lorakit.core.layout import row_ends
from lorakit.data import IGNORE, Collator
from lorakit.inject.context import virtual_positions
from lorakit.training.base import evaluating
from lorakit.training.order import row_lengths

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

WIDE_VALUES = 2**21
"""Logits that are in fp32 at once: 8 MB, and as much again for a temporary."""


def summed_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy summed over trained labels, in nats and fp32, and their number.

    Args:
        logits: `(batch, length, vocabulary)`, or `(batch, classes)` for a classifier.
        labels: `(batch, length)`, where position t is predicted by the logits of t - 1; or `(batch,)`.
    """
    if labels.dim() == 2:
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    loss: Tensor = _SummedCrossEntropy.apply(logits.flatten(0, -2), labels.flatten())  # type: ignore[no-untyped-call]
    return loss, (labels != IGNORE).sum()


class _SummedCrossEntropy(torch.autograd.Function):
    """`sum_i logsumexp(l_i) - l_i[y_i]` over the trained rows, wide for a few rows at a time.

    The gradient, softmax less one at the label, is made on the way, in the logits' dtype: a step holds the logits and
    their gradient, where a loss of wide logits holds four or five times as much.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        grad = torch.zeros_like(logits) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=wide, device=logits.device)
        at_once = max(1, WIDE_VALUES // logits.shape[1])
        if is_hollow(labels):  # a rehearsal's have no values: all are trained, and the third part is like the second
            trained = torch.arange(min(len(labels), 2 * at_once), device=labels.device)
        else:
            trained = (labels != IGNORE).nonzero().squeeze(1)
        for rows in torch.split(trained, at_once):
            here, right = logits[rows].to(wide), labels[rows].unsqueeze(1)
            log_sum = here.logsumexp(1, keepdim=True)
            total += (log_sum - here.gather(1, right)).sum()
            if grad is not None:
                here.sub_(log_sum).exp_()
                here.scatter_add_(1, right, here.new_full(right.shape, -1.0))
                grad[rows] = here.to(grad.dtype)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad * upstream.to(grad.dtype), None


def mean_of_batch(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of one batch per trained token (or row)."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    loss, trained = summed_loss(logits_of(model, inputs, batch["labels"]), batch["labels"])
    return loss / trained


def logits_of(model: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Return the model's logits; one that reads virtual positions after the prompt is told where that ends.

    A row's prompt ends at its first trained label; a classifier's is the whole row.
    """
    told: dict[str, Tensor] = {}
    if virtual_positions(model)[1]:
        ends = row_ends(inputs.get("attention_mask"), inputs["input_ids"])
        if labels.dim() == 2:
            trained = labels != IGNORE
            ends = torch.where(trained.any(1), trained.int().argmax(1), ends)
        told["prompt_ends"] = ends
    logits: Tensor = model(**inputs, **told).logits
    return logits


def trained_labels(labels: Tensor) -> Tensor:
    """Return how many labels `summed_loss` will sum over."""
    return ((labels[:, 1:] if labels.dim() == 2 else labels) != IGNORE).sum()


def batches(
    rows: Dataset, size: int, pad_id: int, device: torch.device | str, *, by_length: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Yield collated batches in order (or the longest first, which pads least), drawing no random number."""
    order = list(range(len(rows)))
    if by_length:
        lengths = row_lengths(rows)
        order.sort(key=lambda i: -lengths[i])
    collate = Collator(pad_id)
    for start in range(0, len(order), size):
        columns: dict[str, Any] = rows[order[start : start + size]]
        lines = [dict(zip(columns, line, strict=True)) for line in zip(*columns.values(), strict=True)]
        yield {name: tensor.to(device) for name, tensor in collate(lines).items()}


@torch.no_grad()
def mean_loss(model: PreTrainedModel, rows: Dataset, size: int, pad_id: int) -> tuple[float, int]:
    """Return the loss per trained token (or row) over all rows, and how many there are; logits are never kept."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    with evaluating(model):
        for batch in batches(rows, size, pad_id, model.device, by_length=True):
            labels = batch.pop("labels")
            loss, trained = summed_loss(logits_of(model, batch, labels), labels)
            total += loss.double().cpu()
            count += int(trained)
    return float(total) / count, count
