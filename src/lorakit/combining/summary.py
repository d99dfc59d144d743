"""What the combined adapter says of itself: where it sits, on which base, and what it is for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from lorakit.core.as_lora import plain_spec
from lorakit.core.site import Site
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.core.state import AdapterState, Base, Update

T = TypeVar("T")


def summary(states: Sequence[AdapterState], updates: tuple[Update, ...], trained: Mapping[str, Tensor]) -> AdapterState:
    """Return the state of these updates: what all adapters agree on stays, and the rest is said anew or left out."""
    purposes = [state.purpose for state in states if state.purpose is not None]
    return AdapterState(
        _spec([state.spec for state in states], [_keys(state.updates) for state in states], updates),
        updates,
        trained,
        _base(states),
        _agreed(purposes, None),
    )


def _spec(specs: Sequence[AdapterSpec], keys: Sequence[set[str]], updates: tuple[Update, ...]) -> AdapterSpec:
    """Return the spec of plain LoRAs at the updates' sites, which are listed where the adapters' own differ."""
    targets = _agreed([spec.targets for spec in specs], None)
    if targets is None or any(own != _keys(updates) for own in keys):
        layers = _agreed([spec.targets.layers for spec in specs], None)
        targets = exactly(updates, layers)
    train = tuple(dict.fromkeys(word for spec in specs for word in spec.train))
    dropout, seed = _agreed([spec.dropout for spec in specs], 0.0), _agreed([spec.seed for spec in specs], 0)
    if not updates:
        return replace(specs[0], targets=targets, train=train, dropout=dropout, seed=seed)
    usual = next(spec for spec in specs if spec.method is not None)
    return plain_spec(replace(usual, targets=targets, train=train, dropout=dropout, seed=seed), updates)


def exactly(updates: Iterable[Update], layers: str | None = None) -> Targets:
    """Return the targets that mean the sites of these updates and no other."""
    return Targets([_exact(update.site) for update in updates] or ("all-linear",), (), layers)


def _base(states: Sequence[AdapterState]) -> Base:
    """Return the base under the first name it has, with every weight that any adapter remembers of it."""
    name = next((state.base.name for state in states if state.base.name is not None), None)
    return Base(name, {path: values for state in reversed(states) for path, values in state.base.probes.items()})


def _keys(updates: Iterable[Update]) -> set[str]:
    return {update.site.key for update in updates}


def _exact(site: Site) -> str:
    """Return the target pattern that means this site alone."""
    return f"re:{re.escape(site.path)}" if site.rows is None else site.key


def _agreed(values: Sequence[T], otherwise: T) -> T:
    """Return the value that all have, or `otherwise`."""
    return values[0] if values and all(value == values[0] for value in values) else otherwise
