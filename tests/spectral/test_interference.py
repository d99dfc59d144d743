"""What two updates of one weight do to each other: by hand, in the extremes, and by chance."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from lorakit.errors import SpecError
from lorakit.spectral.interference import interference
from lorakit.spectral.svd import Svd


def triplets(matrix: Tensor) -> Svd:
    """Return the dense SVD."""
    return Svd(*torch.linalg.svd(matrix, full_matrices=False))


def product(m: int, n: int, rank: int, seed: int) -> Tensor:
    """Return a random matrix of a rank."""
    rng = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(s, dtype=torch.float64, generator=rng) for s in ((m, rank), (rank, n)))
    return left @ right


def test_by_hand() -> None:
    """dW_a = diag(2, 1, 0), dW_b = 3 in the first place and 4 in the last: <,> = 6, norms sqrt 5 and 5."""
    a, b = torch.diag(torch.tensor([2.0, 1, 0])), torch.diag(torch.tensor([3.0, 0, 4]))
    found = interference(triplets(a), triplets(b))
    assert found.alignment == pytest.approx(6 / (5 * math.sqrt(5)))
    assert found.inputs == found.outputs == pytest.approx(0.5), "one of two directions is shared"
    assert found.inputs_by_chance == pytest.approx(2 / 3)
    assert found.disturbed == pytest.approx(3 / math.sqrt(5)), "b says 3 where a reads, and a sqrt 5"
    assert found.disturbs == pytest.approx(2 / 5)
    assert found.chance == pytest.approx(5 / math.sqrt(5) * math.sqrt(2 / 3))
    assert found.forecast == "repeat"


@pytest.mark.parametrize(
    ("change", "forecast"), [(lambda a: 2 * a, "repeat"), (lambda a: -a, "cancel"), (lambda a: a.flip(0), "disturb")]
)
def test_the_same_inputs(change: object, forecast: str) -> None:
    """An update repeats itself, is undone by its negative, and drowned by one that reads the same and says another."""
    a = torch.diag(torch.tensor([1.0, 1, 0, 0]))
    found = interference(triplets(a), triplets(change(a)))  # type: ignore[operator]
    assert found.forecast == forecast
    assert found.inputs == pytest.approx(1.0)


def test_updates_that_read_apart_leave_each_other_alone() -> None:
    a, b = torch.zeros(4, 6), torch.zeros(4, 6)
    a[0, 0], b[0, 3] = 1.0, 5.0
    found = interference(triplets(a), triplets(b))
    assert (found.alignment, found.inputs, found.disturbed, found.disturbs) == (0, 0, 0, 0)
    assert found.outputs == pytest.approx(1.0), "they write the same"
    assert found.forecast == "apart"


def test_random_updates_are_as_chance_says() -> None:
    found = [interference(triplets(product(40, 60, 4, i)), triplets(product(40, 60, 9, i + 500))) for i in range(60)]
    assert statistics.mean(f.disturbed**2 for f in found) == pytest.approx(
        statistics.mean(f.chance**2 for f in found), rel=0.1
    )
    assert statistics.mean(f.inputs for f in found) == pytest.approx(found[0].inputs_by_chance, rel=0.1)
    assert abs(statistics.mean(f.alignment for f in found)) < 0.02


def test_it_is_what_the_dense_matrices_say() -> None:
    a, b = product(12, 10, 3, 1), product(12, 10, 2, 2)
    found = interference(triplets(a), triplets(b))
    v = torch.linalg.svd(a).Vh[:3].T
    assert found.disturbed == pytest.approx(float((b @ v).norm() / a.norm()))
    assert found.alignment == pytest.approx(float((a * b).sum() / a.norm() / b.norm()))


def test_what_does_not_meet_is_refused() -> None:
    with pytest.raises(SpecError, match=r"weights \(4, 4\) and \(4, 5\)"):
        interference(triplets(torch.ones(4, 4)), triplets(torch.ones(4, 5)))
    with pytest.raises(SpecError, match="one of the updates is 0"):
        interference(triplets(torch.ones(4, 4)), triplets(torch.zeros(4, 4)))
