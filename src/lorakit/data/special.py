"""Special tokens in the user's own text: `<|end|>` written in a row ends the text for the model.

They are read as special all the same, because rows rendered by a chat template need it; so they are counted and said.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SpecialCount:
    """Counts the rows whose text holds special tokens, and remembers which."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        names = sorted({*added, *tokenizer.all_special_tokens} - {""}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names))) if names else None
        self.rows, self._seen = 0, Counter[str]()

    def look(self, row: object) -> None:
        """Look through every text of one row."""
        if self._pattern is None:
            return
        found = {name for text in _texts(row) for name in self._pattern.findall(text)}
        self.rows += bool(found)
        self._seen.update(found)

    @property
    def names(self) -> str:
        """Return the most frequent of them, quoted, for one line."""
        shown = [repr(name) for name, _ in sorted(self._seen.items(), key=lambda pair: (-pair[1], pair[0]))]
        return ", ".join(shown[:4]) + (", ..." if len(shown) > 4 else "")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
