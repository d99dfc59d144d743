"""What the numbers of a configuration may be: each method says which, and these say it in the same words."""

from __future__ import annotations

import math
from typing import Any

from lorakit.errors import SpecError


def check_whole(name: str, value: Any, least: int = 1, hint: str = "") -> None:
    """Raise `SpecError` unless `value` is a whole number of at least `least`; `hint` ends the sentence."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SpecError(f"{name} must be a whole number of at least {least}, not {value!r}{hint}")


def check_positive(name: str, value: Any, hint: str = "") -> None:
    """Raise `SpecError` unless `value` is a finite number above 0; `hint` ends the sentence."""
    if not (is_number(value) and value > 0):
        raise SpecError(f"{name} must be a positive number, not {value!r}{hint}")


def check_flag(name: str, value: Any) -> None:
    """Raise `SpecError` unless `value` is true or false: a quoted "false" would be taken for true."""
    if not isinstance(value, bool):
        raise SpecError(f"{name} must be true or false, not {value!r}")


def is_number(value: Any) -> bool:
    """Return whether `value` is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
