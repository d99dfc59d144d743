"""Text from tokens, one at a time: each piece is certain when it is given out, and is never taken back.

A token may hold half a character, and the text so far may be the beginning of a stop string: both are held back until
what follows tells. Only the last few tokens are decoded again, so a token of a long answer costs what one of a short
answer does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_FRESH = 16  # tokens decoded again with each new one; four in a row always have a border of characters
_HALF = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer shows for bytes that are no whole character
_MOST_HALVES = 3  # a character has four bytes at most, and some tokenizers show each byte of half of one


class Writer:
    """Turns the tokens of one answer into text, up to the first stop string that becomes complete.

    Special tokens are left out. Of two stop strings that end at the same character, the longer one cuts.

    Args:
        tokenizer: decodes ids.
        stops: strings, not empty, that end the answer and are no part of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._before: list[int] = []  # given out already; some tokenizers decode a word by what stands before it
        self._fresh: list[int] = []
        self._shown = 0  # characters of the fresh tokens' text that were given out
        self._watch = _Watch(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; nothing is given out after it."""
        return self._watch.found

    def push(self, token: int) -> str:
        """Return the text that is certain now that `token` is there, which may be none."""
        if self.stopped or token in self._special:
            return ""
        self._fresh.append(token)
        text = self._text()
        halves = min(len(text) - len(text.rstrip(_HALF)), _MOST_HALVES)
        certain = text[self._shown : len(text) - halves]
        self._shown += len(certain)
        if text and not halves:
            self._before, self._fresh, self._shown = self._fresh, [], 0
        elif len(self._fresh) > _MOST_FRESH:
            self._let_go(text)
        return self._watch.push(certain)

    def flush(self) -> str:
        """Return what was held back, once no token follows."""
        rest = "" if self.stopped else self._text()[self._shown :]
        self._fresh, self._shown = [], 0
        return self._watch.push(rest) + self._watch.flush()

    def _text(self) -> str:
        """Return the text of the fresh tokens, as it is after those before them."""
        return self._decode(self._before + self._fresh)[len(self._decode(self._before)) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)) if ids else ""

    def _let_go(self, text: str) -> None:
        """Settle the older of many tokens without a clean end, at a border where no character is cut in two."""
        for at in range(len(self._fresh) - 1, 0, -1):
            old, new = self._fresh[:at], self._fresh[at:]
            head = self._decode(self._before + old)[len(self._decode(self._before)) :]
            tail = self._decode(old + new)[len(self._decode(old)) :]
            if head + tail == text and len(head) <= self._shown:
                self._before, self._fresh, self._shown = old, new, self._shown - len(head)
                return


class _Watch:
    """Lets text through up to the first stop string, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(stops)  # how many characters of each stop the text ends with
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        if self.found:
            return ""
        for at, character in enumerate(text):
            longest = 0
            for number, (stop, borders) in enumerate(self._stops):
                matched = self._matched[number] = _advance(stop, borders, self._matched[number], character)
                if matched == len(stop):
                    longest = max(longest, matched)
            if longest:
                self.found = True
                whole = self._held + text[: at + 1]
                self._held = ""
                return whole[: len(whole) - longest]
        whole = self._held + text
        certain = len(whole) - max(self._matched, default=0)
        self._held = whole[certain:]
        return whole[:certain]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _borders(stop: str) -> list[int]:
    """Return, for each beginning of `stop`, the length of its longest border (Knuth, Morris and Pratt, 1977)."""
    borders = [0] * len(stop)
    for at in range(1, len(stop)):
        borders[at] = _advance(stop, borders, borders[at - 1], stop[at])
    return borders


def _advance(stop: str, borders: Sequence[int], matched: int, character: str) -> int:
    """Return how much of `stop` the text ends with after one more character, `matched` being how much it did before."""
    while matched and stop[matched] != character:
        matched = borders[matched - 1]
    return matched + (stop[matched] == character)
