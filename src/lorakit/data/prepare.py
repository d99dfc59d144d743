"""From a source of rows to token ids and labels, with every loss counted and every fault traced to its row.

`prepare` reads, recognises, checks, masks, fits to length and packs; the result is a `Dataset` of `input_ids` and
`labels` (and `position_ids` when packed) beside a `DataReport`. It works in memory, in one process, and leaves no
cache behind.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lorakit.core.lazy import need
from lorakit.data.formats import Format, at_rows, check, named
from lorakit.data.masking import IGNORE, Loss, Segment, Tokens, encode, opening, seam, segments
from lorakit.data.packing import PackRule, pack
from lorakit.data.preview import plain, runs
from lorakit.data.readers import Where, load
from lorakit.data.report import DataReport, Prepared, check_vocabulary
from lorakit.data.special import SpecialCount
from lorakit.errors import DataError, did_you_mean, listing

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Overlong = Literal["drop", "cut", "split", "error"]


def prepare(
    source_or_rows: str | Path | Dataset | Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    format: str = "auto",
    loss: Loss = "completions",
    overlong: Overlong = "drop",
    packing: PackRule | None = None,
    separator: str | None = None,
    seed: int = 0,
    split: str | None = None,
    vocab_size: int | None = None,
    limit: str | None = None,
) -> Prepared:
    """Turn rows into ids and labels of at most `max_length` tokens.

    `overlong` says what becomes of longer rows: `drop`, `cut` (the end is lost), `split` (plain text only, nothing is
    lost) or `error`. `separator` goes between prompt and completion: None decides (a newline, unless every row has
    whitespace there), a string is used as given; hand `report.separator_used` on to validation data and to
    `render_prompt`. `packing` joins examples into rows by a rule, and `seed` shuffles those. `vocab_size` is the number
    of rows of the model's embedding.
    `limit` tells whoever has too long rows what sets their length and what to do, where that is not `max_length`.

    Raises `DataError` for rows that are malformed, have no trained token, or hold ids the model does not know.
    """
    for value, known in ((overlong, get_args(Overlong)), (loss, get_args(Loss))):
        if value not in known:
            raise DataError(f"unknown choice '{value}', expected one of {', '.join(known)}{did_you_mean(value, known)}")
    if max_length < 2:
        raise DataError(f"max_length is {max_length}; expected at least 2: a token, and the one it predicts")
    source, rows, where = load(source_or_rows, split)
    form = named(format, rows)
    check(rows, form, where)
    if overlong == "split" and form.name != "text":
        raise DataError(f"overlong: split is for plain text; pieces of '{form.name}' rows would lose their prompt")
    limit = limit or f"max_length is {max_length}: raise it"
    encoder = _Encoder(tokenizer, form, seam(rows, form, separator), loss, max_length, limit, overlong,
                       SpecialCount(tokenizer))  # fmt: skip
    try:
        start = opening(tokenizer, form)
    except DataError as fault:
        raise DataError(f"{source}: {fault}") from fault
    dataset = encoder.map(rows, start)
    encoder.raise_faults(where, vocab_size)
    report = encoder.report(source, len(rows))
    if packing is None:
        return Prepared(dataset, report)
    packs = pack(dataset, packing, seed)
    full = (report.tokens - packs.saved) / (len(packs.rows) * packs.length)
    report = replace(report, packs=len(packs.rows), row_length=packs.length, packing_efficiency=full,
                     tokens_shared=packs.saved)  # fmt: skip
    return Prepared(packs.rows, report, together=packs.together)


@dataclass
class _Encoder:
    """Encodes batches of rows and keeps count of what becomes of them."""

    tokenizer: PreTrainedTokenizerBase
    form: Format
    separator: str
    loss: Loss
    max_length: int
    limit: str
    overlong: Overlong
    special: SpecialCount
    faults: dict[int, str] = field(default_factory=dict)
    masked: dict[int, Tokens] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    empty = kept = dropped = cut = split = tokens = trained = lost = longest = duplicates = highest = 0

    def map(self, rows: Dataset, start: Sequence[int]) -> Dataset:
        """Return the rows' tokens, each after those of `start`, as a new in-memory dataset."""
        datasets = need("datasets", "train")
        ids = datasets.Sequence(datasets.Value("int32"))
        own = [name for name in rows.column_names if name in {**self.form.needs, **self.form.may}]

        def batch(columns: Mapping[str, list[Any]], numbers: list[int]) -> dict[str, list[list[int]]]:
            values = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            for row in values:
                self.special.look([row[name] for name in own])
                self.empty += self.form.answer != "" and not row[self.form.answer]
            pieces = [self._segments(number, row) for number, row in zip(numbers, values, strict=True)]
            encoded = encode(pieces, self.tokenizer, start, self.loss)
            fitted = [one for number, tokens in zip(numbers, encoded, strict=True) for one in self._fit(number, tokens)]
            return {"input_ids": [one.ids for one in fitted], "labels": [one.labels for one in fitted]}

        mapped: Dataset = rows.map(
            batch,
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            features=datasets.Features(input_ids=ids, labels=ids),
            keep_in_memory=True,
            load_from_cache_file=False,
            new_fingerprint=uuid.uuid4().hex,  # else the tokenizer is pickled and hashed for a cache nobody reads
            desc="tokenising",
        )
        return mapped

    def _segments(self, number: int, row: Mapping[str, Any]) -> list[Segment]:
        try:
            return segments(row, self.form, self.tokenizer, self.separator)
        except DataError as fault:
            self.faults[number] = str(fault)
            return []

    def _fit(self, number: int, tokens: Tokens) -> list[Tokens]:
        length = len(tokens.ids)
        self.longest = max(self.longest, length)
        pieces = [tokens] if length <= self.max_length else self._shorten(number, tokens)
        if pieces:
            self.kept += 1
            self.duplicates += (known := hash(tuple(tokens.ids))) in self.seen
            self.seen.add(known)
        for piece in pieces:
            trained = sum(label != IGNORE for label in piece.labels)
            self.tokens += len(piece.ids)
            self.trained += trained
            self.highest = max(self.highest, *piece.ids, 0)
            if not trained:
                self.masked[number] = piece
        return pieces

    def _shorten(self, number: int, tokens: Tokens) -> list[Tokens]:
        length, size = len(tokens.ids), self.max_length
        match self.overlong:
            case "drop":
                self.dropped += 1
                self.lost += length
                return []
            case "cut":
                self.cut += 1
                self.lost += length - size
                return [Tokens(tokens.ids[:size], tokens.labels[:size])]
            case "split":  # pieces share one token, so that every token is still predicted exactly once
                self.split += 1
                spans = [slice(at, at + size) for at in range(0, length - 1, size - 1)]
                return [Tokens(tokens.ids[span], [IGNORE, *tokens.labels[span][1:]]) for span in spans]
            case "error":
                self.faults[number] = f"has {length} tokens; {self.limit}"
                return []

    def raise_faults(self, where: Where, vocab_size: int | None) -> None:
        """Raise `DataError` for rows that failed, that have nothing to learn, or whose ids the model lacks."""
        if self.faults:
            raise DataError(f"rows that cannot be prepared:\n{at_rows(self.faults, where)}")
        check_vocabulary(self.highest, self.tokenizer, vocab_size)
        if self.masked:
            places = where(list(self.masked)[:12])
            sample = plain(runs(*next(iter(self.masked.values())), self.tokenizer))
            raise DataError(
                f"{len(self.masked)} rows have no token to train on:\n"
                f"{listing(places + [''] * (len(self.masked) - len(places)))}\n"
                f"the first of them, encoded (trained text would stand in [[ ]]):\n{sample[:600]}\n{self._remedy()}"
            )
        if not self.kept:
            raise DataError(
                f"every row is longer than {self.max_length} tokens (the longest has {self.longest}); {self.limit}, "
                "or choose overlong: cut"
            )

    def _remedy(self) -> str:
        if self.cut:
            return f"the prompt alone fills the row; {self.limit}, or choose overlong: drop"
        if self.form.name in ("messages", "sharegpt"):
            return "a conversation needs a turn of the assistant; remove these rows, or choose loss: all"
        return "remove the empty rows"

    def report(self, source: str, rows: int) -> DataReport:
        """Return the counts as a value."""
        return DataReport(
            source=source,
            format=self.form.name,
            rows=rows,
            kept=self.kept,
            tokens=self.tokens,
            trained_tokens=self.trained,
            longest=self.longest,
            max_length=self.max_length,
            dropped_overlong=self.dropped,
            cut=self.cut,
            split=self.split,
            tokens_lost=self.lost,
            duplicates=self.duplicates,
            empty_completions=self.empty,
            special_tokens=self.special.rows,
            special_names=self.special.names,
            separator_used=self.separator,
        )
