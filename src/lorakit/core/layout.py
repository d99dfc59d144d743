"""Where virtual positions stand in a row, as arithmetic on columns.

    [padding | before | tokens of the prompt | after | tokens of the answer]     before + n + after columns, from n

`starts` and `ends` say for each row at which column its prompt starts and ends. Attention within a window counts
columns, so virtual positions stand beside the tokens, and padding on the left stays outside. What a model gives back at
the last virtual position after the prompt is what the answer's first token is predicted from, so it takes the place of
the prompt's last column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """`before` virtual positions in front of each prompt, at column `starts`, and `after` behind it, at column `ends`.

    Without `starts` all rows start at column 0; `ends` may be missing where `after` is 0.
    """

    before: int
    after: int
    ends: Tensor | None = None
    starts: Tensor | None = None

    @property
    def total(self) -> int:
        """Return the number of virtual positions."""
        return self.before + self.after

    def spread(self, virtual: Tensor, tokens: Tensor) -> Tensor:
        """Return the rows of `tokens (batch, n, ...)` with `virtual (batch, before + after, ...)` in their places."""
        joined = torch.cat([virtual, tokens], 1)
        return joined if self._even else _columns(joined, self._source(tokens.shape[1], tokens.device))

    def mask(self, given: Tensor) -> Tensor:
        """Return an attention mask `(batch, n)` with the virtual positions, which are never masked."""
        return self.spread(given.new_ones(len(given), self.total), given)

    def positions(self, given: Tensor) -> Tensor:
        """Return position ids `(batch, n)` moved to make room, with those of the virtual positions."""
        rows = next((len(told) for told in (self.ends, self.starts) if told is not None), len(given))
        given = given.expand(rows, -1)
        front = torch.arange(self.before, device=given.device).expand(rows, -1)
        if self.ends is None:
            return self.spread(front, given + self.before)
        last = given.gather(1, (self.ends[:, None] - 1).clamp(min=0)).masked_fill(self.ends[:, None] == 0, -1)
        behind = self.before + last + 1 + torch.arange(self.after, device=given.device)
        answer = torch.arange(given.shape[1], device=given.device) >= self.ends[:, None]
        return self.spread(torch.cat([front, behind], 1), given + self.before + self.after * answer)

    def cut(self, hidden: Tensor, answers: bool) -> Tensor:
        """Return `hidden (batch, before + n + after, d)` at the n columns of the tokens.

        With `answers`, the last virtual position after a prompt stands in for the prompt's last column.
        """
        if self._even:
            return hidden[:, self.before :]
        column = torch.arange(hidden.shape[1] - self.total, device=hidden.device)
        starts, ends = self._bounds(hidden.device)
        return _columns(
            hidden, column + self.before * (column >= starts) + self.after * (column >= ends - int(answers))
        )

    @property
    def _even(self) -> bool:
        """Whether all rows have their virtual positions in the same columns, the first ones."""
        return self.ends is None and self.starts is None

    def _bounds(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return where each row's prompt starts and ends, `(batch or 1, 1)` each; what is not told is 0."""
        starts, ends = (torch.zeros(1, 1, dtype=torch.long, device=device) if told is None else told[:, None]
                        for told in (self.starts, self.ends))  # fmt: skip
        return starts, ends

    def _source(self, n: int, device: torch.device) -> Tensor:
        """Return, for each column of the result, its column in `[before | after | tokens]`."""
        starts, ends = self._bounds(device)
        column = torch.arange(n + self.total, device=device)
        token = column - self.before * (column >= starts)
        behind = token - ends
        is_after = (behind >= 0) & (behind < self.after) & (column >= starts + self.before)
        token = self.total + token - self.after * (behind >= self.after)
        virtual = torch.where(is_after, self.before + behind, column - starts)
        return torch.where(is_after | ((column >= starts) & (column < starts + self.before)), virtual, token)


def row_starts(mask: Tensor | None) -> Tensor | None:
    """Return the column of the first token of each row `(batch,)`, or None where no row has padding before it."""
    starts = None if mask is None else (mask != 0).long().argmax(1)
    return starts if starts is not None and bool(starts.any()) else None


def row_ends(mask: Tensor | None, tokens: Tensor) -> Tensor:
    """Return the column after the last token of each row `(batch,)`, where padding is masked."""
    batch, n = tokens.shape[:2]
    if mask is None:
        return torch.full((batch,), n, device=tokens.device)
    return (torch.arange(1, n + 1, device=mask.device) * (mask != 0)).amax(1)


def _columns(values: Tensor, columns: Tensor) -> Tensor:
    return values[torch.arange(len(values), device=values.device)[:, None], columns]
