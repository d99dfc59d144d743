"""What became of the rows: a value for the terminal, for events and for the run's record. Nothing is lost silently."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from lorakit.errors import DataError, few

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class DataReport:
    """Counts of rows and tokens from reading to packing.

    `rows` were read and `kept` are left; `tokens` and `trained_tokens` (those that carry loss; for classification one
    a row) count what is left, `tokens_lost` what was dropped or cut off; `longest` is the longest row before that.
    `empty_completions` rows teach only to stop; `special_tokens` rows have text that is read as special tokens, a few
    of which are in `special_names`; `label_rows` counts the rows of each class that are left. `packs`, their
    `row_length` in tokens and `packing_efficiency` (tokens over room) are None without packing; `tokens_shared` are
    those of prompts that another example of the same row brings.
    """

    source: str
    format: str
    rows: int
    kept: int
    tokens: int
    trained_tokens: int
    longest: int
    max_length: int
    dropped_overlong: int = 0
    cut: int = 0
    split: int = 0
    tokens_lost: int = 0
    duplicates: int = 0
    empty_completions: int = 0
    special_tokens: int = 0
    special_names: str = ""
    separator_used: str = ""
    label_rows: Mapping[str, int] = field(default_factory=dict)
    packs: int | None = None
    row_length: int | None = None
    packing_efficiency: float | None = None
    tokens_shared: int = 0

    def lines(self) -> list[str]:
        """Say it in lines for a terminal, the losses only where there are any."""
        trained = f"{self.trained_tokens:,} of them trained ({self.trained_tokens / self.tokens:.0%})"
        if self.format == "classification":
            trained = "one label a row"
        lines = [
            f"{self.source}: {self.rows:,} rows, format {self.format}",
            f"{self.tokens:,} tokens, {trained}; longest row {self.longest:,}",
        ]
        overlong = f"longer than {self.max_length:,} tokens"
        if self.dropped_overlong:
            share = self.dropped_overlong / self.rows
            lines.append(
                f"dropped {self.dropped_overlong:,} rows ({share:.1%}) {overlong}: {self.tokens_lost:,} tokens"
            )
        if self.cut:
            share = self.cut / self.rows
            lines.append(f"cut {self.cut:,} rows ({share:.1%}) {overlong}: {self.tokens_lost:,} tokens lost")
        if self.split:
            lines.append(f"split {self.split:,} rows {overlong}; no token lost")
        if self.duplicates:
            lines.append(f"{self.duplicates:,} rows repeat an earlier one")
        if self.empty_completions:
            have, they = ("row has", "it teaches") if self.empty_completions == 1 else ("rows have", "they teach")
            lines.append(f"{self.empty_completions:,} {have} an empty completion, so {they} the model to say nothing")
        if self.special_tokens:
            hold, their = ("row holds", "its") if self.special_tokens == 1 else ("rows hold", "their")
            lines.append(
                f"{self.special_tokens:,} {hold} special tokens in {their} text ({self.special_names}), and they are "
                "read as such"
            )
        if self.separator_used:
            lines.append(f"prompt and completion are joined by {self.separator_used!r}")
        if self.label_rows:
            most_first = sorted(self.label_rows.items(), key=lambda one: -one[1])
            told = few([f"{name!r} {rows:,}" for name, rows in most_first if rows], 10)
            lines.append(f"{len(self.label_rows):,} classes, rows of each: {told}")
        if absent := [repr(name) for name, rows in self.label_rows.items() if not rows]:
            lines.append(f"no row has the label {few(absent, 10)}")
        if self.packs is not None:
            lines.append(f"packed into {self.packs:,} rows of {self.row_length:,}, {self.packing_efficiency:.1%} full")
        if self.tokens_shared:
            share = self.tokens_shared / self.tokens
            lines.append(f"a prompt stands once for all its answers: {self.tokens_shared:,} tokens ({share:.0%}) less")
        return lines

    def to_json(self) -> dict[str, object]:
        """Return the fields as plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Prepared:
    """Rows as tensors-to-be, what became of the rest, and for classification the class names in id order.

    `together` is how many packed rows make up a step.
    """

    dataset: Dataset
    report: DataReport
    labels: tuple[str, ...] | None = None
    together: int = 1


def check_vocabulary(highest: int, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None) -> None:
    """Raise `DataError` when an id lies beyond the `vocab_size` rows of the model's embedding."""
    if vocab_size is not None and highest >= vocab_size:
        raise DataError(
            f"the tokenizer has {len(tokenizer)} tokens, the model only {vocab_size} rows: the data uses id {highest} "
            f"({tokenizer.convert_ids_to_tokens(highest)!r}); use the tokenizer the model came with, or resize its "
            "embedding"
        )
