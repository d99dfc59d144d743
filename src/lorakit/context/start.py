"""Where vectors that a model reads start, and what their numbers may be: shared by the methods of this room."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorakit.core.checks import check_whole
from lorakit.core.method import Start
from lorakit.errors import SpecError


def check_some(before: Any, after: Any) -> None:
    """Raise `SpecError` unless there is a position before the row or after its prompt."""
    check_whole("before", before, 0)
    check_whole("after", after, 0)
    if before + after < 1:
        raise SpecError("before and after are both 0, so nothing would be read; give at least one a position")


def check_choice(name: str, value: Any, known: Mapping[str, Any] | Sequence[str]) -> None:
    """Raise `SpecError` unless `value` is one of the known words."""
    if value not in known:
        raise SpecError(f"{name} must be one of {', '.join(known)}, not {value!r}")


@torch.no_grad()
def fill_from_vocabulary(vectors: Tensor, start: Start) -> None:
    """Fill `vectors (..., d)` with embeddings of tokens drawn from the whole vocabulary."""
    ids = torch.randint(len(start.weight), vectors.shape[:-1], generator=start.rng)
    vectors.copy_(start.weight[ids.to(start.weight.device)])


@torch.no_grad()
def fill_normal(vectors: Tensor, start: Start) -> None:
    """Fill `vectors (..., d)` from a normal distribution with mean and deviation of the vocabulary's embeddings."""
    table = start.weight.float()
    vectors.normal_(float(table.mean()), float(table.std()), generator=start.rng)


@torch.no_grad()
def fill_from_ids(vectors: Tensor, ids: Sequence[int], start: Start) -> None:
    """Fill `vectors (t, d)` with the embeddings of `ids`, repeated or cut to t."""
    chosen = torch.tensor([ids[i % len(ids)] for i in range(len(vectors))], device=start.weight.device)
    vectors.copy_(start.weight[chosen])


FILLS = {"vocabulary": fill_from_vocabulary, "normal": fill_normal}
