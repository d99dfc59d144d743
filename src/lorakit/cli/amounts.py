"""Amounts of bytes as options take them: 800kB, 1.5MB, 4GiB, a bare number of bytes, or a share of something."""

from __future__ import annotations

import re

from lorakit.errors import RecipeError

_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*(%|b|[kmg]i?b)?")
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def bytes_of(option: str, text: str, whole: int | None = None) -> int:
    """Return what an option's text says in bytes; `50%` only where there is a `whole` to take it of.

    Raises:
        RecipeError: a text that is no amount, with examples of what is.
    """
    found = _AMOUNT.fullmatch(text.strip().lower())
    if found is None or (found[2] == "%" and whole is None):
        share = "" if whole is None else "50%, "
        raise RecipeError(f"{option} {text!r} is no amount of bytes; write {share}800kB, 1.5MB or 4GB")
    amount, unit = float(found[1]), found[2] or "b"
    return round(amount / 100 * whole if unit == "%" and whole is not None else amount * _UNITS[unit])
