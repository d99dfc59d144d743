"""Rows with a label: token ids of a text or a pair of texts, and the number of its class.

Here a long text is cut by default, for its label stays true and an evaluation set must keep its rows; it is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorakit.core.lazy import need
from lorakit.data.formats import at_rows, check, named
from lorakit.data.readers import Where, load
from lorakit.data.report import DataReport, Prepared, check_vocabulary
from lorakit.data.special import SpecialCount
from lorakit.errors import DataError, did_you_mean, few

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def prepare_classification(
    source_or_rows: str | Path | Dataset | Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    labels: Sequence[str] | None = None,
    overlong: Literal["cut", "drop", "error"] = "cut",
    split: str | None = None,
    vocab_size: int | None = None,
    limit: str | None = None,
) -> Prepared:
    """Turn rows of `text`, optional `text_pair` and `label` into `input_ids` and a class number in `labels`.

    `labels` are the class names in the order of their numbers; without them they are the dataset's own class names,
    or the values found, sorted. Hand `Prepared.labels` on to validation data. A label is a name, or the number of one
    where no name is itself a number.
    `limit` tells whoever has too long rows what sets their length and what to do, where that is not `max_length`.

    Raises `DataError` for malformed rows, unknown or blank labels, found ones that are alike but for case and blanks, a
    single class, or ids the model does not know.
    """
    source, rows, where = load(source_or_rows, split)
    form = named("classification", rows)
    check(rows, form, where)
    values = _label_values(rows)
    if blank := {i: "field 'label' is empty" for i, v in enumerate(values) if isinstance(v, str) and not v.strip()}:
        raise DataError(f"rows without a label:\n{at_rows(blank, where)}")
    names = tuple(labels) if labels is not None else _label_names(rows, values)
    classes = _numbers(values, names, where)
    columns, lengths = _encode(rows, tokenizer, max_length, cut=overlong == "cut", where=where)
    limit = limit or f"max_length is {max_length}: raise it"
    if nothing := {
        i: "has no token, so there is nothing to classify; remove it" for i, n in enumerate(lengths) if not n
    }:
        raise DataError(f"rows that cannot be prepared:\n{at_rows(nothing, where)}")
    long = {i: f"has {n} tokens; {limit}" for i, n in enumerate(lengths) if n > max_length}
    if long and overlong == "error":
        raise DataError(f"rows that cannot be prepared:\n{at_rows(long, where)}")
    kept = [i for i in range(len(rows)) if overlong == "cut" or i not in long]
    if not kept:
        raise DataError(f"every row is longer than {max_length} tokens; {limit}, or choose overlong: cut")
    columns = {name: [column[i] for i in kept] for name, column in columns.items()} | {
        "labels": [classes[i] for i in kept]
    }
    special = SpecialCount(tokenizer)
    for row in rows.select_columns([name for name in ("text", "text_pair") if name in rows.column_names]):
        special.look(row)
    ids, counts = columns["input_ids"], Counter(columns["labels"])
    check_vocabulary(max(max(row, default=0) for row in ids), tokenizer, vocab_size)
    tokens = sum(map(len, ids))
    report = DataReport(
        source=source,
        format=form.name,
        rows=len(rows),
        kept=len(kept),
        tokens=tokens,
        trained_tokens=len(kept),
        longest=max(lengths),
        max_length=max_length,
        dropped_overlong=len(rows) - len(kept),
        cut=len(long) if overlong == "cut" else 0,
        tokens_lost=sum(lengths) - tokens,
        duplicates=len(kept) - len({tuple(row) for row in ids}),
        special_tokens=special.rows,
        special_names=special.names,
        label_rows={name: counts[number] for number, name in enumerate(names)},
    )
    return Prepared(need("datasets", "train").Dataset.from_dict(columns), report, names)


def _encode(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, *, cut: bool, where: Where
) -> tuple[dict[str, list[Any]], list[int]]:
    """Tokenise texts or pairs, and return the columns beside each row's length before any cut."""
    texts = [list(rows[name]) for name in ("text", "text_pair") if name in rows.column_names]
    unpaired = {
        i: "field 'text_pair' is null, but other rows have one" for i, text in enumerate(texts[-1]) if text is None
    }
    if unpaired:
        raise DataError(f"rows without a second text:\n{at_rows(unpaired, where)}")
    whole = tokenizer(*texts, verbose=False)
    lengths = [len(ids) for ids in whole["input_ids"]]
    if cut and max(lengths) > max_length:  # by the tokenizer, which keeps its closing tokens
        whole = tokenizer(*texts, truncation=True, max_length=max_length, verbose=False)
    return {name: whole[name] for name in ("input_ids", "token_type_ids") if name in whole}, lengths


def _label_values(rows: Dataset) -> list[str | int]:
    """The labels as written, or their names where the dataset knows them; 1.0 is 1."""
    names = getattr(rows.features["label"], "names", ())
    values = [int(v) if isinstance(v, float) else v for v in rows["label"]]
    return [names[v] if isinstance(v, int) and 0 <= v < len(names) else v for v in values]


def _label_names(rows: Dataset, values: Sequence[str | int]) -> tuple[str, ...]:
    own = getattr(rows.features["label"], "names", None)
    found = {str(value) for value in values}
    numeric = all(name.lstrip("-").isdigit() for name in found)
    names = tuple(own or sorted(found, key=int if numeric else str))
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(name.strip().casefold(), []).append(name)
    if own is None and (twins := [" and ".join(map(repr, group)) for group in alike.values() if len(group) > 1]):
        raise DataError(
            f"labels that differ in case or blanks alone: {few(twins)}; write each class in one way, or name all of "
            "them with data.labels if they are meant so"
        )
    if len(names) < 2:
        raise DataError(f"every row has the label {names[0]!r}; a classifier needs two classes or more")
    return names


def _numbers(values: Sequence[str | int], names: Sequence[str], where: Where) -> list[int]:
    """Look each label up by name; a number counts into `names` where none of them is a number."""
    number = {name: i for i, name in enumerate(names)}
    if len(number) < len(names):
        twice = [repr(name) for name, times in Counter(names).items() if times > 1]
        raise DataError(f"data.labels names {few(twice)} more than once; a class has one name")
    counted = len(names) if not any(name.lstrip("-").isdigit() for name in names) else 0
    found = [number.get(str(v), v if isinstance(v, int) and 0 <= v < counted else None) for v in values]
    unknown = {
        i: f"unknown label {values[i]!r}{did_you_mean(str(values[i]), names)}" for i, n in enumerate(found) if n is None
    }
    if unknown:
        raise DataError(f"the labels are {', '.join(map(repr, names[:20]))}:\n{at_rows(unknown, where)}")
    return [n for n in found if n is not None]
