"""JSON of a known shape: each value is read by a function that knows its type, and a wrong one is named by its key.

The files of a server are edited by hand and sent by strangers, so nothing in them is believed before it is read here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from lorakit.errors import did_you_mean, shown

T = TypeVar("T")
Read = Callable[[Any, str], T]
"""Takes a value and the key it stands at, and returns what it means or raises `Mistyped`."""


class Mistyped(ValueError):
    """A value of another type than its key has, or a key that is unknown or missing."""

    @classmethod
    def at(cls, key: str, expected: str, found: object) -> Mistyped:
        """Return the error of a value that is not what its key needs."""
        return cls(f"{key}: expected {expected}, found {shown(found)}")


def text(value: Any, key: str) -> str:
    """Return a string that holds something."""
    if not isinstance(value, str) or not value:
        raise Mistyped.at(key, "text", value)
    return value


def whole(value: Any, key: str) -> int:
    """Return a whole number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise Mistyped.at(key, "a whole number of at least 0", value)
    return value


def number(value: Any, key: str) -> float:
    """Return a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Mistyped.at(key, "a number", value)
    return float(value)


def sha256(value: Any, key: str) -> str:
    """Return 64 hexadecimal digits in lower case."""
    if not isinstance(value, str) or len(value) != 64 or not set(value) <= set("0123456789abcdef"):
        raise Mistyped.at(key, "a sha256 of 64 hexadecimal digits", value)
    return value


def maybe(read: Read[T]) -> Read[T | None]:
    """Return a reader that takes null too."""
    return lambda value, key: None if value is None else read(value, key)


def several(read: Read[T]) -> Read[tuple[T, ...]]:
    """Return a reader of lists whose values `read` takes."""

    def of(value: Any, key: str) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise Mistyped.at(key, "a list", value)
        return tuple(read(one, f"{key}[{index}]") for index, one in enumerate(value))

    return of


def mapping(read: Read[T]) -> Read[dict[str, T]]:
    """Return a reader of objects with any keys, whose values `read` takes."""

    def of(value: Any, key: str) -> dict[str, T]:
        if not isinstance(value, dict):
            raise Mistyped.at(key, "an object", value)
        return {name: read(one, f"{key}.{name}" if key else name) for name, one in value.items()}

    return of


def record(fields: Mapping[str, Read[Any]]) -> Read[dict[str, Any]]:
    """Return a reader of objects with exactly these keys."""

    def of(value: Any, key: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise Mistyped.at(key or "it", "an object", value)
        at = f"{key}." if key else ""
        if unknown := [name for name in value if name not in fields]:
            near = did_you_mean(unknown[0], fields) or f"; known are {', '.join(fields)}"
            raise Mistyped(f"{at}{unknown[0]}: unknown key{near}")
        if missing := [name for name in fields if name not in value]:
            raise Mistyped(f"{at}{missing[0]}: missing")
        return {name: read(value[name], f"{at}{name}") for name, read in fields.items()}

    return of
