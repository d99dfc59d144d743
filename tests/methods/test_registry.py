"""What every method says of itself is true: its count is the number of values it trains."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lorakit.core.method import Method
from lorakit.core.site import Site
from tests.law.cases import CONTEXTS, METHODS

SITES = {
    "linear": Site("layer", 8, 12),
    "module": Site("layer", 12, 12, kind="module"),
    "model": Site("", 12, 3, (2, 4), kind="model"),
}


def expected(method: Method, site: Site) -> int:
    """Evaluate the count of a method, and of the method it wraps, at a site; `letters` are sizes it works out there."""
    fields: dict[str, Any] = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    fields |= method.letters(site) if hasattr(method, "letters") else {}
    if isinstance(inner := fields.get("inner"), Method):
        fields["inner"] = expected(inner, site)
    return int(eval(method.count, {"m": site.out, "n": site.in_, **fields}))


@pytest.mark.parametrize("name", [*METHODS, *CONTEXTS])
def test_the_count_a_method_states_is_what_it_trains(name: str) -> None:
    method = (METHODS | CONTEXTS)[name]
    site = next((site for kind, site in SITES.items() if kind in method.kinds), None)
    if site is None:
        pytest.skip("acts on no layer")
    declared = method.tensors(site).values()
    assert sum(d.numel for d in declared if d.trainable and d.shared is None) == expected(method, site)
    assert method.formula
    assert method.paper
