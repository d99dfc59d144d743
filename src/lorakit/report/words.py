"""Numbers in words, for pages and for the terminal alike."""

from __future__ import annotations

from collections.abc import Collection


def size(count: float) -> str:
    """Return bytes in words, in powers of 1000: `1.4 MB`."""
    return f"{count:.0f} B" if count < 1000 else _scaled(count, "B", ".1f", 1000)


def operations(count: float) -> str:
    """Return floating-point operations in words, to three digits: `109 TFLOP`."""
    return _scaled(count, "FLOP", ".3g", 999.5)


def duration(seconds: float) -> str:
    """Return seconds in words: `0.13 s`, `42 s`, `3:05`, `1:02:03`."""
    if seconds < 9.5:
        return f"{seconds:.2g} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def amount(value: float) -> str:
    """Return an amount of money or energy: two decimals, or two digits where that would be nothing."""
    return f"{value:,.2f}" if value >= 0.01 or value == 0 else f"{value:.2g}"


def span(numbers: Collection[int]) -> str:
    """Return `4` where all are 4, `2 to 8` where they lie between, `0` where there are none."""
    low, high = min(numbers, default=0), max(numbers, default=0)
    return f"{low}" if low == high else f"{low} to {high}"


def _scaled(value: float, unit: str, form: str, most: float) -> str:
    """Return a value below `most` with the letter of the power of 1000 it was divided by, 10^18 at most."""
    letters = ("", "k", "M", "G", "T", "P", "E")
    power = 0
    while value >= most and power < len(letters) - 1:
        value, power = value / 1000, power + 1
    return f"{value:{form}} {letters[power]}{unit}"
