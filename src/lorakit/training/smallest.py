"""The smallest form of an adapter that still scores as asked on given rows: sizes are tried, each scored in full."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
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
    measure, whole = _score(scored(state))

    def judge(made: Compressed) -> Tried:
        _, score = _score(scored(made.state))
        good = score >= whole * (1 - within) if measure == "accuracy" else score <= whole * (1 + within)
        one = Tried(made.bytes, made.error, score, good)
        note(one)
        return one

    best, tried = None, []
    for made, one in _halved(state, lambda size: compress(state, size=size, dtype=dtype, base=base), judge):
        best = made if one.within else best  # each size that is tried after one that was within is smaller
        tried.append(one)
    if best is None:
        raise CombineError(
            f"no smaller form that was tried keeps the {measure} of {whole:.4g} within {within:.1%}; allow more, "
            "or keep its numbers in fewer bits: dtype"
        )
    return Smallest(best, whole, measure, tuple(tried))


def _halved(
    state: AdapterState, make: Callable[[int], Compressed], judge: Callable[[Compressed], Tried]
) -> Iterator[tuple[Compressed, Tried]]:
    """Yield each form that is tried with its judgement: a smaller one after one that was within, else a larger one."""
    high = stored_bytes(state)
    low = LEAST * high
    for _ in range(TRIES):
        size = round(math.sqrt(low * high))
        try:
            made = make(size)
        except CombineError:  # smaller than any form of it
            low = size
            continue
        tried = judge(made)
        yield made, tried
        low, high = (low, size) if tried.within else (size, high)


def _score(found: Evaluation) -> tuple[str, float]:
    if found.accuracy is not None:
        return "accuracy", found.accuracy
    assert found.perplexity is not None
    return "perplexity", found.perplexity
