"""Which cases of a test run always, and which among the slow tests alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """Return a case for `parametrize` that runs among the slow tests alone."""
    return pytest.param(*values, marks=pytest.mark.slow)


def others_slow(cases: Iterable[Any], always: Iterable[Any]) -> list[Any]:
    """Return the cases for `parametrize`, those not in `always` as slow ones; a tuple is a case of several values.

    Raises:
        ValueError: a case in `always` that is none of the cases.
    """
    cases, quick = list(cases), list(always)
    if unknown := [case for case in quick if case not in cases]:
        raise ValueError(f"no such cases: {unknown}")
    return [case if case in quick else slow(*(case if isinstance(case, tuple) else (case,))) for case in cases]
