"""The tests' own helpers do what the tests rely on: shapes are checked, tracing is not disturbed, close means close."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.slow import others_slow
from tests.tolerances import assert_close, tolerance

ROOT = Path(__file__).parents[1]

SHAPED = """
from __future__ import annotations
from dataclasses import dataclass
from jaxtyping import Float
from torch import Tensor

def branch(x: Float[Tensor, "*b i"], down: Float[Tensor, "r i"], up: Float[Tensor, "o r"]) -> Float[Tensor, "*b o"]:
    return x @ down.mT @ up.mT

@dataclass(frozen=True)
class Plain:
    rank: int

    def delta(self, down: Float[Tensor, "r i"], up: Float[Tensor, "o r"]) -> Float[Tensor, "o i"]:
        return up @ down

    @staticmethod
    def twice(x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b i"]:
        return 2 * x
"""

PROBE = """
import torch
from jaxtyping import TypeCheckError
from tests.shape_checks import check_shapes

check_shapes("shaped")
import shaped

x, down, up = torch.ones(4, 5), torch.ones(2, 5), torch.ones(3, 2)
plain = shaped.Plain(2)

def refused(call, *args):
    try:
        call(*args)
    except TypeCheckError:
        return True
    return False

def forward(x, down, up):
    return plain.twice(shaped.branch(x, down, up)) @ plain.delta(down, up)

assert refused(shaped.branch, x, up, down), "swapped factors passed"
assert refused(plain.delta, up, down), "swapped factors passed a method"
assert refused(shaped.Plain, "two"), "a string passed for an int field"
assert refused(plain.twice, 3), "a number passed a static method"
assert torch.equal(torch.compile(forward, fullgraph=True, backend="eager")(x, down, up), forward(x, down, up))

class Module(torch.nn.Module):
    def forward(self, x, down, up):
        return forward(x, down, up)

for strict in (True, False):
    exported = torch.export.export(Module(), (x, down, up), strict=strict).module()
    assert torch.equal(exported(x, down, up), forward(x, down, up))
"""


def test_shapes_are_checked_except_while_torch_traces(tmp_path: Path) -> None:
    (tmp_path / "shaped.py").write_text(SHAPED)
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    probe = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert probe.returncode == 0, probe.stderr


def test_tests_are_offline_and_start_from_one_seed() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    first = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(first, torch.rand(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_close_allows_rounding_and_refuses_the_next_size(dtype: torch.dtype) -> None:
    expected = torch.tensor([1.0, 100.0, 0.0], dtype=torch.float64)
    near, far = expected + 90 * tolerance(dtype), expected + 110 * tolerance(dtype)
    assert_close(near, expected, dtype=dtype)
    with pytest.raises(AssertionError):
        assert_close(far, expected, dtype=dtype)


def test_close_never_broadcasts() -> None:
    with pytest.raises(AssertionError, match=r"shape \(1,\), expected \(3,\)"):
        assert_close(torch.ones(1), torch.ones(3))


def test_close_refuses_nan_and_is_exact_for_integers_and_zeros() -> None:
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([float("nan")]), torch.tensor([1.0]))
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([1]), torch.tensor([2]))
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([1e-9]), torch.tensor([0.0]))


def test_cases_that_are_not_always_run_are_slow() -> None:
    one, two = others_slow([("a", 1), ("b", 2)], [("b", 2)])
    assert two == ("b", 2)
    assert (one.values, [mark.name for mark in one.marks]) == (("a", 1), ["slow"])
    (alone,) = others_slow(["ab"], [])
    assert alone.values == ("ab",), "a word is one value"
    with pytest.raises(ValueError, match="no such cases: \\['c'\\]"):
        others_slow(["a"], ["c"])
