"""How two adapters differ: in what they were set to, and in what they do to each weight.

Settings that differ may do the same (rank 16 of which 4 act), and equal settings anything: so both are compared, and
the changes of weights as products of factors, `|dW_a - dW_b|_F` and `cos(dW_a, dW_b)`, which no (out, in) matrix is
formed for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lorakit.combining.change import added, size
from lorakit.combining.how import rounding
from lorakit.combining.lineup import Place, lineup
from lorakit.core.method import Static
from lorakit.core.state import AdapterState, Update, expect_adapter
from lorakit.errors import CombineError, grouped, listing

SAME = 1e-6
"""How far apart, of the larger of the two, changes may be that fp32 does not tell apart."""


@dataclass(frozen=True)
class Gap:
    """Two values of one thing: `|a|`, `|b|` and `|a - b|`, Frobenius norms; one that an adapter has not is 0."""

    first: float
    second: float
    apart: float

    @property
    def relative(self) -> float:
        """Return `|a - b| / max(|a|, |b|)`: 0 where they are equal, 1 where one is 0, 2 where they oppose."""
        larger = max(self.first, self.second)
        return self.apart / larger if larger else 0.0

    @property
    def alignment(self) -> float | None:
        """Return `cos(a, b) = (|a|^2 + |b|^2 - |a - b|^2) / (2 |a| |b|)`, or None where one is 0."""
        if not (self.first and self.second):
            return None
        cosine = (self.first**2 + self.second**2 - self.apart**2) / (2 * self.first * self.second)
        return max(-1.0, min(1.0, cosine))


@dataclass(frozen=True)
class Difference:
    """What differs between two adapters of one base.

    `settings` maps a setting to its two values, where they differ. `weights` has the changes of each weight that either
    changes by key of its site, and `tensors` what either trained whole by name. `moving` are updates that depend on the
    input, such as a mixture: only their tensors can be compared, so a gap there need not be one of what they do.
    """

    settings: Mapping[str, tuple[Any, Any]]
    weights: Mapping[str, Gap]
    tensors: Mapping[str, Gap]
    moving: Mapping[str, Gap]

    @property
    def total(self) -> Gap:
        """Return the changes of all weights as one long vector."""
        parts = [(gap.first, gap.second, gap.apart) for gap in self.weights.values()]
        return Gap(*(math.hypot(*column) for column in zip(*parts, strict=True))) if parts else Gap(0.0, 0.0, 0.0)

    @property
    def same(self) -> bool:
        """Return whether both do the same to the base, whatever they were set to."""
        gaps = (*self.weights.values(), *self.tensors.values(), *self.moving.values())
        return all(gap.relative <= SAME for gap in gaps)


@torch.no_grad()
def difference(first: AdapterState, second: AdapterState, base: Mapping[str, Tensor] | None = None) -> Difference:
    """Return how two adapters of one base differ.

    Args:
        first: an adapter.
        second: another one.
        base: the base's canonical weights by key of their site, for a dW such as DoRA's, which depends on them.

    Raises:
        CombineError: adapters of other bases or classes, layers that do not line up, tensors that do not fit or are
            not finite, weights that are needed and not given.
    """
    states = [first, second]
    for state in states:
        expect_adapter(state)
    still = [replace(state, updates=_of_weights(state.updates, True)) for state in states]
    weights, problems = {}, []
    for place in lineup(still, [1.0, -1.0]):
        try:
            weights[place.site.key] = _gap(place, base or {})
        except CombineError as problem:
            problems.append(f"{place.site.key}: {problem}")
    if problems:
        raise CombineError(f"{len(problems)} layers cannot be compared:\n{listing(grouped(problems))}")
    return Difference(
        dict(_settings(_plain(first), _plain(second))),
        weights,
        _gaps(*(state.trained for state in states)),
        _moving(*(_of_weights(state.updates, False) for state in states)),
    )


def _gap(place: Place, base: Mapping[str, Tensor]) -> Gap:
    terms = place.terms(base)
    first, second = ([t.change for t in terms if sign * t.weight > 0] for sign in (1, -1))
    every = added([term.change for term in terms], [term.weight for term in terms])
    apart, nothing = size(every), rounding(every, terms)
    sides = [size(added(side, [1.0] * len(side))) if side else 0.0 for side in (first, second)]
    return Gap(sides[0], sides[1], apart if apart > nothing else 0.0)


def _gaps(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Gap]:
    """Return the gap of every tensor that either has; of another shape, none of it is alike."""
    found = {}
    for name in dict.fromkeys((*first, *second)):
        one, other = (side[name].detach().cpu().double() if name in side else None for side in (first, second))
        sizes = [0.0 if tensor is None else float(tensor.norm()) for tensor in (one, other)]
        alike = one is not None and other is not None and one.shape == other.shape
        apart = float((one - other).norm()) if alike else math.hypot(*sizes)  # type: ignore[operator]
        found[name] = Gap(sizes[0], sizes[1], apart)
    return found


def _of_weights(updates: Sequence[Update], wanted: bool) -> tuple[Update, ...]:
    return tuple(update for update in updates if isinstance(update.method, Static) == wanted)


def _moving(first: Sequence[Update], second: Sequence[Update]) -> dict[str, Gap]:
    sides = ({f"{u.site.key}.{name}": t for u in side for name, t in u.tensors.items()} for side in (first, second))
    return _gaps(*sides)


def _plain(state: AdapterState) -> dict[str, Any]:
    purpose = None if state.purpose is None else state.purpose.to_json()
    return {"base": state.base.name, **state.spec.to_json(), "purpose": purpose}


def _settings(one: Any, other: Any, name: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield the leaves in which two trees of plain values differ, by their dotted names."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys((*one, *other)):
            yield from _settings(one.get(key), other.get(key), f"{name}.{key}" if name else key)
    elif one != other:
        yield name, (one, other)
