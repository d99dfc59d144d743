"""In which order a run visits its rows: a plain function of seed and epoch, so that a resumed run goes on in it.

Of each step's rows every process takes its share, so the same rows make a step on any number of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Sampler

if TYPE_CHECKING:
    from datasets import Dataset

    from lorakit.training.recipe import Recipe
    from lorakit.training.stage import Stage

POOL = 50
"""Steps whose rows are sorted by length together: enough to leave little padding, few enough to stay mixed."""


class Shuffled(Sampler[int]):
    """Visits every row once an epoch, in an order that seed and epoch alone decide.

    With `lengths` the rows of a step are of about one length, and steps of all lengths follow each other at random.
    `together` is the rows a step; those that fill no step come last, whatever their length.
    """

    def __init__(self, rows: int, seed: int, lengths: list[int] | None = None, together: int = 1) -> None:
        self._rows, self._seed, self._epoch = rows, seed, 0
        self._lengths, self._together = lengths, together

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._rows

    def __iter__(self) -> Iterator[int]:
        """Yield row numbers."""
        rng = torch.Generator().manual_seed(self._seed + self._epoch)
        order = torch.randperm(self._rows, generator=rng).tolist()
        yield from order if self._lengths is None else self._grouped(order, self._lengths, rng)

    def _grouped(self, order: list[int], lengths: list[int], rng: torch.Generator) -> Iterator[int]:
        full = self._rows // self._together * self._together
        size = self._together * POOL
        pools = (order[start : min(start + size, full)] for start in range(0, full, size))
        ordered = list(chain.from_iterable(sorted(pool, key=lengths.__getitem__) for pool in pools))
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
    lengths = row_lengths(rows) if grouped else None
    return Shuffled(len(rows), train.seed, lengths, stage.batch_rows * train.accumulation)


def row_lengths(rows: Dataset) -> list[int]:
    """Return the tokens of each row."""
    return [len(ids) for ids in rows["input_ids"]]


def padded_tokens(recipe: Recipe, stage: Stage) -> int:
    """Return the tokens of one epoch as they are computed, padding included."""
    lengths, order, size = row_lengths(stage.train.dataset), list(row_order(recipe, stage)), stage.batch_rows
    parts = (order[start : start + size] for start in range(0, len(order), size))
    return sum(len(part) * max(lengths[i] for i in part) for part in parts)
