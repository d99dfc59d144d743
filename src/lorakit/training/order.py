"""In which order a run visits its rows: a plain function of seed and epoch, so that a resumed run goes on in it.

Of each step's rows every process takes its share, so the same rows make a step on any number of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Sampler

from lorakit.data.packing import row_lengths

if TYPE_CHECKING:
    from lorakit.training.recipe import Recipe
    from lorakit.training.stage import Stage

POOL = 50
"""Steps whose rows are sorted by length together: enough to leave little padding, few enough to stay mixed."""


class Shuffled(Sampler[int]):
    """Visits every row once an epoch, in an order that seed and epoch alone decide.

    `together` is the rows a step. With `grouped` the rows of a step are of about one length, and steps of all lengths
    follow each other at random; those that fill no step come last, whatever their length. Where rows differ in length,
    the first step of the first epoch visits the longest of all, so that memory that does not suffice shows at once.
    """

    def __init__(self, lengths: Sequence[int], seed: int, together: int = 1, *, grouped: bool = False) -> None:
        self._lengths, self._seed, self._epoch = lengths, seed, 0
        self._together, self._is_grouped = together, grouped

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        """Yield row numbers."""
        rng = torch.Generator().manual_seed(self._seed + self._epoch)
        order = torch.randperm(len(self), generator=rng).tolist()
        if self._epoch == 0 and len(set(self._lengths)) > 1:
            longest = sorted(order, key=lambda i: -self._lengths[i])[: self._together]
            yield from longest
            taken = set(longest)
            order = [i for i in order if i not in taken]
        yield from self._grouped(order, rng) if self._is_grouped else order

    def _grouped(self, order: list[int], rng: torch.Generator) -> Iterator[int]:
        full = len(order) // self._together * self._together
        size = self._together * POOL
        pools = (order[start : min(start + size, full)] for start in range(0, full, size))
        ordered = list(chain.from_iterable(sorted(pool, key=self._lengths.__getitem__) for pool in pools))
        for step in torch.randperm(full // self._together, generator=rng).tolist():
            yield from ordered[step * self._together : (step + 1) * self._together]
        yield from order[full:]


class Dealt(Sampler[int]):
    """What one process visits of an order: its share of each step's rows, and of those that fill no step.

    The last shares may be smaller there; the length told is the largest, so that all processes take as many steps.
    """

    def __init__(self, order: Shuffled, together: int, place: int = 0, processes: int = 1) -> None:
        self._order, self._together, self._place, self._processes = order, together, place, processes

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self._order.set_epoch(epoch)

    def __len__(self) -> int:
        """Return the number of rows of the largest share."""
        steps, rest = divmod(len(self._order), self._together)
        return steps * (self._together // self._processes) + -(-rest // self._processes)

    def __iter__(self) -> Iterator[int]:
        """Yield row numbers."""
        rows = iter(self._order)
        while step := list(islice(rows, self._together)):
            share = -(-len(step) // self._processes)
            yield from step[self._place * share : (self._place + 1) * share]


def row_order(recipe: Recipe, stage: Stage) -> Shuffled:
    """Return the order of a run: grouped by length where the recipe says so, or leaves it open and rows are labelled.

    A labelled row is short and weighs as much as a long one, so padding is most of what a shuffled batch computes.
    """
    asked, train = recipe.train.group_by_length, recipe.train
    rows = stage.train.dataset
    grouped = stage.task == "classification" if asked == "auto" else asked
    return Shuffled(row_lengths(rows), train.seed, stage.batch_rows * train.accumulation, grouped=grouped)


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Return the numbers of rows by their length, the longest first, equal ones in their order."""
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def padded_tokens(recipe: Recipe, stage: Stage) -> int:
    """Return the tokens of one epoch as they are computed, padding included."""
    lengths, order, size = row_lengths(stage.train.dataset), list(row_order(recipe, stage)), stage.batch_rows
    parts = (order[start : start + size] for start in range(0, len(order), size))
    return sum(len(part) * max(lengths[i] for i in part) for part in parts)
