"""The smallest form of an adapter that still scores as asked on given rows: sizes are tried, each scored in full."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lorakit.combining.compress import Compressed, compress, stored_bytes
from lorakit.core.state import AdapterState
from lorakit.errors import CombineError, SpecError
from lorakit.inject.attach import attach, detach
from lorakit.training.evaluate import Evaluation, evaluate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorakit.training.recipe import DataSection

TRIES, LEAST = 7, 1 / 64
"""How many sizes are tried, halving a range of factors, and the share of the adapter's bytes it begins at."""


@dataclass(frozen=True)
class Tried:
    """One size: its bytes, the error of the weights, its score, and whether that is within what was asked."""

    bytes: int
    error: float
    score: float
    within: bool


@dataclass(frozen=True, eq=False)
class Smallest:
    """The smallest form that was within, the score of the whole adapter, what the score is, and everything tried."""

    made: Compressed
    score: float
    measure: str
    tried: tuple[Tried, ...]


def smallest(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    state: AdapterState,
    source: str,
    data: DataSection,
    within: float,
    *,
    split: str | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    dtype: str | None = None,
    base: Mapping[str, Tensor] | None = None,
    note: Callable[[Tried], None] = lambda tried: None,
) -> Smallest:
    """Return the smallest form of an adapter whose score is within a share of its own.

    The score is the accuracy of a classifier, at least `(1 - within)` times the adapter's, and else the perplexity, at
    most `(1 + within)` times. What is returned was scored itself; a smaller one that was not tried may do as well.

    Args:
        model: the bare base.
        tokenizer: of the base.
        state: the adapter.
        source: the rows to score on, such as those of the validation.
        data: how they are read.
        within: the share of the score that may be lost.
        split: of a folder or a dataset.
        limit: only the first rows.
        batch_size: rows at once.
        dtype: what numbers are kept in, a key of `combining.STORED`; as they are if None.
        base: canonical weights by key, for a dW that depends on them.
        note: called with each size that was tried.

    Raises:
        SpecError: a share that is not above 0 and below 1.
        CombineError: an adapter that has no smaller form within it.
    """
    if not 0 < within < 1:
        raise SpecError(f"within is the share of the score that may be lost, above 0 and below 1, not {within!r}")

    def scored(adapter: AdapterState) -> Evaluation:
        handle = attach(model, adapter)
        try:
            return evaluate(model, tokenizer, source, data, split=split, limit=limit, batch_size=batch_size)
        finally:
            detach(model, handle.name)

    compress(state, rank=1, dtype=dtype, base=base)  # what has no smaller form for another reason than its size says so
    whole = _score(scored(state))
    high = stored_bytes(state)
    low, best, tried = LEAST * high, None, []
    for _ in range(TRIES):
        size = round(math.sqrt(low * high))
        try:
            made = compress(state, size=size, dtype=dtype, base=base)
        except CombineError:  # smaller than any form of it
            low = size
            continue
        score = _score(scored(made.state))
        good = score[1] >= whole[1] * (1 - within) if whole[0] == "accuracy" else score[1] <= whole[1] * (1 + within)
        tried.append(Tried(made.bytes, made.error, score[1], good))
        note(tried[-1])
        low, high = (low, size) if good else (size, high)
        best = made if good else best
    if best is None:
        raise CombineError(
            f"no smaller form that was tried keeps the {whole[0]} of {whole[1]:.4g} within {within:.1%}; allow more, "
            "or keep its numbers in fewer bits: dtype"
        )
    return Smallest(best, whole[1], whole[0], tuple(tried))


def _score(found: Evaluation) -> tuple[str, float]:
    if found.accuracy is not None:
        return "accuracy", found.accuracy
    assert found.perplexity is not None
    return "perplexity", found.perplexity
