"""The largest batch and the longest context that fit a device, from a few rehearsals of small ones.

What a step holds grows with the rows in a straight line, and with their length as a polynomial of the second degree
(attention masks); so two or three rehearsals tell all others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

from lorakit.core.spec import AdapterSpec
from lorakit.inject.skeleton import size_of
from lorakit.planning.fitting import largest
from lorakit.planning.memory import Parts
from lorakit.training.forecast import Load, forecast

if TYPE_CHECKING:
    from transformers import PreTrainedModel


KEPT_FREE = 1000
"""One part in so many of a room stays free: within a moment one instant may overtake another, which no law foresees."""


@dataclass(frozen=True)
class Limits:
    """The most rows of the load's length in a micro-batch, the most tokens in one row; 0 where not even one fits.

    `way` is how the step is run then, by the names of `planning.fitting.VERDICTS`.
    """

    rows: int
    length: int
    way: str = "plain"


def limits(model: PreTrainedModel, spec: AdapterSpec, load: Load, rooms: Sequence[int]) -> list[Limits]:
    """Return the largest batch and context of a run whose step may hold so many bytes, weights included, for each room.

    A context is no longer than the model has positions for. Each moment of a step grows by a law of its own, and the
    fullest of them counts.
    """

    def moments(rows: int, length: int) -> list[int]:
        found = forecast(model, spec, replace(load, rows=rows, length=length), Parts())
        return [held.total for held in found.moments]

    short = max(16, min(load.length, 64))
    by_rows = _fullest({rows: moments(rows, load.length) for rows in (1, 2)})
    by_length = _fullest({length: moments(1, length) for length in (short, 2 * short, 4 * short)})
    positions = size_of(model.config, "max_position_embeddings") or 2**20
    rooms = [room - room // KEPT_FREE for room in rooms]
    return [Limits(largest(by_rows, room), largest(by_length, room, at=short, ceiling=positions)) for room in rooms]


def _fullest(points: dict[int, list[int]]) -> Callable[[int], int]:
    """Return the largest of the polynomials through the moments at each point."""
    laws = [_through(dict(zip(points, values, strict=True))) for values in zip(*points.values(), strict=True)]
    return lambda x: max(law(x) for law in laws)


def _through(points: dict[int, int]) -> Callable[[int], int]:
    """Return the polynomial through all points (Lagrange)."""

    def value(x: int) -> int:
        total = 0.0
        for a, y in points.items():
            term = float(y)
            for b in points:
                term *= (x - b) / (a - b) if b != a else 1.0
            total += term
        return ceil(total)

    return value
