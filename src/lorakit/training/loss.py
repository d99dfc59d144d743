"""The one loss of training and evaluation: a sum over trained tokens (or rows), and how many they are.

A mean per micro-batch, averaged over micro-batches, weighs a token by the company it keeps; two numbers that are
added up do not. Whoever needs a mean divides at the end, once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.core.hollow import is_hollow
from lorakit.core.layout import row_ends
from lorakit.core.modes import evaluating
from lorakit.data import IGNORE, Collator
from lorakit.data.branches import seen
from lorakit.data.packing import row_lengths
from lorakit.inject.context import telling_ends, virtual_positions
from lorakit.kernels.linear_cross_entropy import linear_cross_entropy, summed_cross_entropy
from lorakit.training import processes
from lorakit.training.head import given_to, head_of
from lorakit.training.order import longest_first

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


def summed_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy summed over trained labels, in nats and fp32, and their number.

    Args:
        logits: `(batch, length, vocabulary)`, or `(batch, classes)` for a classifier.
        labels: `(batch, length)`, where position t is predicted by the logits of t - 1; or `(batch,)`.
    """
    rows, right = _trained_rows(labels)
    return summed_cross_entropy(logits.flatten(0, -2), rows, right), trained_labels(labels)


def loss_of_batch(model: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return `summed_loss` of the model's logits, which are never made where `head_of` finds that they need not be."""
    head = head_of(model) if labels.dim() == 2 else ""
    if isinstance(head, str):
        return summed_loss(logits_of(model, inputs, labels), labels)
    with given_to(head.layer) as given:
        logits_of(model, inputs, labels)
    hidden, layer = given[0].flatten(0, 1), head.layer
    weight, bias = (None if t is None else t.to(hidden.dtype) for t in (layer.weight, layer.bias))
    rows, right = _trained_rows(labels)
    return linear_cross_entropy(hidden, weight, bias, rows, right, head.temper), trained_labels(labels)


def how_lost(model: Any) -> str:
    """Say how the model's loss is computed: without logits, or why with them."""
    head = head_of(model)
    return f"plain, because {head}" if isinstance(head, str) else "fused, the logits never exist whole"


def _trained_rows(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return which of all rows `(batch * length,)` are trained, and their labels.

    The last position of a text predicts nothing; of a rehearsed batch, which has no values, all others are trained.
    """
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE) if labels.dim() == 2 else labels
    if is_hollow(labels):
        places = torch.arange(labels.numel(), device=labels.device).view(labels.shape)
        rows = (places[:, :-1] if labels.dim() == 2 else places).flatten()
    else:
        rows = (shifted.flatten() != IGNORE).nonzero().squeeze(1)
    return rows, shifted.flatten()[rows]


def mean_of_batch(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of one batch per trained token (or row)."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    loss, trained = loss_of_batch(model, inputs, batch["labels"])
    return loss / trained


def logits_of(model: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Return the model's logits; one that reads virtual positions after the prompt is told where that ends.

    A row's prompt ends at its first trained label; a classifier's is the whole row.
    """
    told: AbstractContextManager[None] = nullcontext()
    if virtual_positions(model)[1]:
        ends = row_ends(inputs.get("attention_mask"), inputs["input_ids"])
        if labels.dim() == 2:
            trained = labels != IGNORE
            ends = torch.where(trained.any(1), trained.int().argmax(1), ends)
        told = telling_ends(model, ends)
    with told:
        logits: Tensor = model(**seen(model, inputs)).logits
    return logits


def trained_labels(labels: Tensor) -> Tensor:
    """Return how many labels `summed_loss` will sum over."""
    return ((labels[:, 1:] if labels.dim() == 2 else labels) != IGNORE).sum()


def untrained(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch with no label to train: its loss and its gradients are 0."""
    return {**batch, "labels": torch.full_like(batch["labels"], IGNORE)}


def batches(
    rows: Dataset, size: int, pad_id: int, device: torch.device | str, *, by_length: bool = False, dealt: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Yield collated batches in order (or the longest first, which pads least), drawing no random number.

    If `dealt`, each process of the run gets its share of them, and as many as the others: the last may be `untrained`.
    """
    order = longest_first(row_lengths(rows)) if by_length else list(range(len(rows)))
    collate = Collator(pad_id)

    def at(start: int) -> dict[str, Tensor]:
        columns: dict[str, Any] = rows[order[start : start + size]]
        lines = [dict(zip(columns, line, strict=True)) for line in zip(*columns.values(), strict=True)]
        return {name: tensor.to(device) for name, tensor in collate(lines).items()}

    starts = range(0, len(order), size)
    mine = starts[processes.here() :: processes.count()] if dealt else starts
    yield from map(at, mine)
    if dealt and len(mine) * processes.count() < len(starts):
        yield untrained(at(0))


@torch.no_grad()
def mean_loss(model: PreTrainedModel, rows: Dataset, size: int, pad_id: int) -> tuple[float, int]:
    """Return the loss per trained token (or row) over all rows, and how many there are; logits are never kept.

    The processes of a run share the batches, and all get the sum.
    """
    found = torch.zeros(2, dtype=torch.float64)
    with evaluating(model):
        for batch in batches(rows, size, pad_id, model.device, by_length=True, dealt=True):
            labels = batch.pop("labels")
            loss, trained = loss_of_batch(model, batch, labels)
            found += torch.stack([loss.double(), trained.double()]).cpu()
    loss_of_all, count = processes.total(found).tolist()
    return loss_of_all / count, int(count)
