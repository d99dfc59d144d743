"""Fitting: the first variant that fits is the verdict, and bisection finds exact edges."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import SpecError
from lorakit.planning.devices import Device
from lorakit.planning.fitting import Fit, fits, largest
from lorakit.planning.memory import Parts

TEN = Device("ten", 10)


def sized(**totals: int) -> dict[str, Parts]:
    """Return variants of these totals; `four` and `both` are the 4-bit ones."""
    names = {"four": "4 bits", "both": "4 bits and checkpointing"}
    return {names.get(name, name): Parts(weights=total - 1, overhead=1) for name, total in totals.items()}


@pytest.mark.parametrize(
    ("variants", "verdict", "spare"),
    [
        (sized(plain=10, checkpointing=8, four=6, both=4), "fits", 0),
        (sized(plain=11, checkpointing=8, four=6, both=4), "fits with checkpointing", 2),
        (sized(plain=15, checkpointing=11, four=6, both=4), "fits in 4 bits", 4),
        (sized(plain=15, checkpointing=13, four=12, both=4), "fits in 4 bits with checkpointing", 6),
        (sized(plain=15, checkpointing=13, four=14, both=12), "does not fit", -2),
        (sized(both=4, plain=9), "fits", 1),
        (sized(plain=11), "does not fit", -1),
    ],
)
def test_the_first_variant_that_fits_is_the_verdict(variants: dict[str, Parts], verdict: str, spare: int) -> None:
    found = fits(TEN, variants)
    assert (found.verdict, found.spare) == (verdict, spare)


def test_what_does_not_fit_tells_of_the_variant_that_is_nearest_to() -> None:
    found = fits(TEN, sized(plain=15, checkpointing=12, four=13))
    assert found == Fit("ten", "does not fit", 12, 10)
    assert found.to_json() == {"device": "ten", "verdict": "does not fit", "needed": 12, "limit": 10, "spare": -2}


def test_overhead_counts() -> None:
    assert fits(TEN, {"plain": Parts(weights=10)}).verdict == "fits"
    assert fits(TEN, {"plain": Parts(weights=10, overhead=1)}).verdict == "does not fit"


def test_no_or_unknown_variants_are_refused() -> None:
    with pytest.raises(SpecError, match="nothing to fit; give one of plain"):
        fits(TEN, {})
    with pytest.raises(SpecError, match="unknown variant '4 bit'; did you mean '4 bits'"):
        fits(TEN, {"4 bit": Parts()})


@given(base=st.integers(0, 5000), each=st.integers(1, 999), limit=st.integers(0, 10**5), at=st.integers(1, 300))
def test_the_largest_fits_and_one_more_does_not(base: int, each: int, limit: int, at: int) -> None:
    best = largest(lambda n: base + each * n, limit, at=at)
    assert best == max(0, (limit - base) // each)


def test_the_largest_stops_at_the_ceiling() -> None:
    assert largest(lambda n: 0, 1, ceiling=1000) == 1000
    assert largest(lambda n: 0, 1, at=4000, ceiling=1000) == 1000
    assert largest(lambda n: n * n, 50, ceiling=1000) == 7


def test_the_largest_asks_few_times() -> None:
    asked: list[int] = []

    def needed(n: int) -> int:
        asked.append(n)
        return n

    assert largest(needed, 1000) == 1000
    assert len(asked) <= 20
    assert len(set(asked)) == len(asked)
