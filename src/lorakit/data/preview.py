"""One masked example made visible: what is trained stands out, what is only context is dim, special tokens show.

Colour carries it on a terminal; `plain` says the same with double brackets where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, repeat
from typing import TYPE_CHECKING, NamedTuple

from lorakit.data.masking import IGNORE
from lorakit.data.report import Prepared

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase


class Run(NamedTuple):
    """Neighbouring tokens of one kind, decoded together so that characters of several tokens stay whole."""

    text: str
    trained: bool
    special: bool


def example(prepared: Prepared, tokenizer: PreTrainedTokenizerBase, index: int = 0) -> list[Run]:
    """Cut row `index`, or the first example in it where rows are packed; a classifier's class comes after its text."""
    row = prepared.dataset[index]
    ids, labels = row["input_ids"], row["labels"]
    if isinstance(labels, int):
        names = prepared.labels or ()
        return [*runs(ids, [IGNORE] * len(ids), tokenizer), Run(f" {names[labels]}", True, False)]
    ends = zip(row.get("position_ids", []), row.get("branches", repeat(0)), strict=False)
    end = next((i for i, (position, branch) in enumerate(ends) if (i and position == 0) or branch > 1), len(ids))
    return runs(ids[:end], labels[:end], tokenizer)


def runs(ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[Run]:
    """Cut an example `(length,)` where trained meets untrained or special meets ordinary."""
    special = set(tokenizer.all_special_ids)
    kinds = groupby(zip(ids, labels, strict=True), key=lambda pair: (pair[1] != IGNORE, pair[0] in special))
    return [Run(_decode([token for token, _ in pairs], tokenizer), *kind) for kind, pairs in kinds]


def preview(prepared: Prepared, tokenizer: PreTrainedTokenizerBase, index: int = 0) -> Text:
    """Show row `index` of the dataset: trained text bright green, context dim, special tokens reversed."""
    return coloured(example(prepared, tokenizer, index))


def coloured(runs: Sequence[Run]) -> Text:
    """Show the runs of an example in colour."""
    from rich.text import Text

    text = Text()
    for run in runs:
        text.append(run.text, ("bold green" if run.trained else "dim") + (" reverse" if run.special else ""))
    return text


def plain(runs: Sequence[Run]) -> str:
    """Show the runs of an example without colour: trained text between double brackets."""
    parts = groupby(runs, key=lambda run: run.trained)
    pieces = ((trained, "".join(run.text for run in part)) for trained, part in parts)
    return "".join(f"[[{text}]]" if trained else text for trained, text in pieces)


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
