"""Numbers in words."""

from __future__ import annotations

import pytest

from lorakit.report import words


def test_a_short_time_is_not_nothing() -> None:
    assert [words.duration(s) for s in (0.1294, 1.25, 9.4)] == ["0.13 s", "1.2 s", "9.4 s"]


@pytest.mark.parametrize(
    ("count", "said"),
    [(999, "999 FLOP"), (999_499, "999 kFLOP"), (999_500, "1 MFLOP"), (106_199_777_280, "106 GFLOP"),
     (108_818_902_024_192, "109 TFLOP"), (2.5e18, "2.5 EFLOP"), (9.4e20, "940 EFLOP")],
)  # fmt: skip
def test_operations_have_three_digits(count: float, said: str) -> None:
    assert words.operations(count) == said


def test_a_small_amount_is_not_nothing() -> None:
    assert [words.amount(x) for x in (1234.5, 0.01, 0.00014, 0)] == ["1,234.50", "0.01", "0.00014", "0.00"]
