"""Which numbers end a run: a loss that is not finite always, a gradient norm only where no scaler explains it."""

from __future__ import annotations

import math

import pytest

from lorakit.errors import LorakitError
from lorakit.training.finite import OVERFLOWS, FiniteCheck

OVERFLOWED = {"loss": 2.5, "grad_norm": math.inf}
FINE = {"loss": 2.5, "grad_norm": 1.0}


def test_without_a_scaler_the_first_gradient_that_is_not_finite_ends_the_run() -> None:
    with pytest.raises(LorakitError, match=r"step 3: grad_norm is inf; .*Lower train\.lr \(it was 0\.001\)"):
        FiniteCheck(1e-3)(OVERFLOWED, 3, scaled=False)


def test_a_scaler_may_overflow_but_not_for_ever() -> None:
    check = FiniteCheck(1e-3)
    for step in range(OVERFLOWS - 1):
        check(OVERFLOWED, step, scaled=True)
    check(FINE, OVERFLOWS, scaled=True)
    for step in range(OVERFLOWS - 1):
        check({"loss": 2.5, "grad_norm": math.nan}, step, scaled=True)
        check({"eval_loss": 2.0}, step, scaled=True)
    with pytest.raises(LorakitError, match="step 40: grad_norm is inf, 20 steps in a row"):
        check(OVERFLOWED, 40, scaled=True)


@pytest.mark.parametrize("name", ["loss", "eval_loss"])
def test_no_scaler_excuses_a_loss_that_is_not_finite(name: str) -> None:
    with pytest.raises(LorakitError, match=f"step 1: {name} is nan"):
        FiniteCheck(1e-3)({**OVERFLOWED, name: math.nan}, 1, scaled=True)
