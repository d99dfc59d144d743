"""Where virtual positions stand in a row, as arithmetic on columns.

    [before | tokens of the prompt | after | tokens of the answer]        before + n + after columns, from n

`ends` says for each row at which column its prompt ends. What a model gives back at the last virtual position after the
prompt is what the answer's first token is predicted from, so it takes the place of the prompt's last column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """`before` virtual positions in front of each row, and `after` of them behind its prompt, at column `ends`."""

    before: int
    after: int
    ends: Tensor | None = None

    @property
    def total(self) -> int:
        """Return the number of virtual positions."""
        return self.before + self.after

    def spread(self, virtual: Tensor, tokens: Tensor) -> Tensor:
        """Return the rows of `tokens (batch, n, ...)` with `virtual (batch, before + after, ...)` in their places."""
        joined = torch.cat([virtual, tokens], 1)
        return joined if self.ends is None else _columns(joined, self._source(tokens.shape[1]))

    def mask(self, given: Tensor) -> Tensor:
        """Return an attention mask `(batch, n)` with the virtual positions, which are never masked."""
        return self.spread(given.new_ones(len(given), self.total), given)

    def positions(self, given: Tensor) -> Tensor:
        """Return position ids `(batch, n)` moved to make room, with those of the virtual positions."""
        rows = len(given) if self.ends is None else len(self.ends)
        given = given.expand(rows, -1)
        front = torch.arange(self.before, device=given.device).expand(rows, -1)
        if self.ends is None:
            return torch.cat([front, given + self.before], 1)
        last = given.gather(1, (self.ends[:, None] - 1).clamp(min=0)).masked_fill(self.ends[:, None] == 0, -1)
        behind = self.before + last + 1 + torch.arange(self.after, device=given.device)
        answer = torch.arange(given.shape[1], device=given.device) >= self.ends[:, None]
        return self.spread(torch.cat([front, behind], 1), given + self.before + self.after * answer)

    def cut(self, hidden: Tensor, answers: bool) -> Tensor:
        """Return `hidden (batch, before + n + after, d)` at the n columns of the tokens.

        With `answers`, the last virtual position after a prompt stands in for the prompt's last column.
        """
        n = hidden.shape[1] - self.total
        if self.ends is None:
            return hidden[:, self.before :]
        column = torch.arange(n, device=hidden.device).expand(len(hidden), -1)
        return _columns(hidden, self.before + column + self.after * (column >= self.ends[:, None] - int(answers)))

    def _source(self, n: int) -> Tensor:
        """Return, for each column of the result, its column in `[before | after | tokens]`."""
        assert self.ends is not None
        column = torch.arange(n + self.total, device=self.ends.device) - self.before
        behind = column - self.ends[:, None]
        token = self.total + torch.where(behind < 0, column, column - self.after)
        virtual = torch.where(column < 0, column + self.before, self.before + behind)
        return torch.where((column < 0) | ((behind >= 0) & (behind < self.after)), virtual, token)


def row_ends(mask: Tensor | None, tokens: Tensor) -> Tensor:
    """Return the column after the last token of each row `(batch,)`, where padding is masked."""
    batch, n = tokens.shape[:2]
    if mask is None:
        return torch.full((batch,), n, device=tokens.device)
    return (torch.arange(1, n + 1, device=mask.device) * (mask != 0)).amax(1)


def _columns(values: Tensor, columns: Tensor) -> Tensor:
    return values[torch.arange(len(values), device=values.device)[:, None], columns]
