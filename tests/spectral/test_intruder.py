"""Intruder dimensions: planted ones are found, aligned changes are none, and mitigation takes out what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lorakit.errors import SpecError
from lorakit.spectral.intruder import intruders
from lorakit.spectral.subspace import random_directions
from tests.tolerances import assert_close


def weight(m: int = 64, n: int = 48) -> Tensor:
    """Return a weight whose directions are told apart: singular values 10, 9, 8.1, ..."""
    rng = torch.Generator().manual_seed(7)
    sigma = 10 * 0.9 ** torch.arange(min(m, n), dtype=torch.float64)
    return random_directions(len(sigma), m, rng).T @ sigma.diag() @ random_directions(len(sigma), n, rng)


def planted(m: int = 64, n: int = 48, size: float = 20.0, count: int = 1) -> Tensor:
    rng = torch.Generator().manual_seed(8)
    return size * random_directions(count, m, rng).T @ random_directions(count, n, rng)


@pytest.mark.parametrize(("m", "n"), [(64, 48), (64, 96), (80, 80)])
@pytest.mark.parametrize("count", [1, 3])
def test_planted_ones_are_found(m: int, n: int, count: int) -> None:
    found = intruders(weight(m, n), planted(m, n, count=count))
    assert found.count == count
    assert found.places == tuple(range(count)), "the strongest directions of the sum"


def test_by_hand() -> None:
    # W = diag(2, 1, 0), dW = 5 e3 (e1 + e2)^T / sqrt(2): W e3 has no part in it, y_1 leans on e3, which U of W holds
    # only as the direction of size 0; cos(y_1, x_i) is what is left of it in the plane of e1 and e2
    base = torch.diag(torch.tensor([2.0, 1.0]))
    turned = torch.tensor([[0.0, -1.0], [1.0, 0.0]]) @ base - base
    assert intruders(base, turned, top=2, epsilon=0.99).count == 0, "e1 and e2 have changed places, and are still there"
    # y_1 = y_2 = at 45 degrees to both: cos 0.707
    to_45 = torch.tensor([[1.0, -1.0], [1.0, 1.0]]) / 2**0.5 @ base - base
    found = intruders(base, to_45, top=2, epsilon=0.71)
    assert found.count == 2
    assert_close(found.cosines, torch.full((2,), 2**-0.5))
    assert replace(found, epsilon=0.70).count == 0


@pytest.mark.parametrize("place", [0, 3, 40])
def test_a_change_along_the_weight_s_own_directions_is_none(place: int) -> None:
    u, _, vh = torch.linalg.svd(weight())
    assert intruders(weight(), 20 * torch.outer(u[:, place], vh[place])).count == 0
    assert intruders(weight(), torch.zeros(64, 48, dtype=torch.float64)).count == 0
    assert intruders(weight(), -0.5 * weight()).count == 0


def test_one_among_the_others_is_found_and_taken_out() -> None:
    # along the weight's last right vector, whose own singular value is 0.07, so that 6 stands between 6.56 and 5.90
    base = weight()
    u, s, vh = torch.linalg.svd(base)
    delta = 6.0 * torch.outer(u[:, 60], vh[47])  # u has 64 columns, of which the weight uses 48
    found = intruders(base, delta)
    assert found.places == (5,)
    down, up = found.mitigation(0.0)
    assert_close(up @ down, -(delta + s[47] * torch.outer(u[:, 47], vh[47])), scale=10.0)


def test_only_the_leading_directions_are_looked_at() -> None:
    weak = planted(size=4.2)  # below the 9th singular value 4.3
    assert intruders(weight(), weak, top=3).count == 0
    assert intruders(weight(), weak, top=20, epsilon=0.8).count >= 1


@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_mitigation_leaves_what_it_says(keep: float) -> None:
    base, delta = weight(), planted(count=2)
    found = intruders(base, delta)
    down, up = found.mitigation(keep)
    assert (down.shape, up.shape) == ((2, 48), (64, 2))
    after = base + delta + up @ down
    kept = torch.linalg.svdvals(base + delta)
    expected = torch.cat([keep * kept[:2], kept[2:]]).sort(descending=True).values
    assert_close(torch.linalg.svdvals(after), expected)
    if keep == 1.0:
        assert torch.equal(after, base + delta), "to the bit"
    if keep == 0.0:
        assert intruders(base, delta + up @ down).count == 0


def test_without_intruders_there_is_nothing_to_mitigate() -> None:
    down, up = intruders(weight(), 0.1 * weight()).mitigation(0.0)
    assert (down.shape, up.shape) == ((0, 48), (64, 0))
    assert not (up @ down).any()


def test_16_bit_weights_are_decomposed_in_fp32() -> None:
    found = intruders(weight().bfloat16(), planted().bfloat16())
    assert (found.count, found.s.dtype) == (1, torch.float32)


def test_what_cannot_be_is_refused() -> None:
    base, delta = weight(), planted()
    with pytest.raises(SpecError, match=r"the weight is \(64, 48\) and dW \(48, 64\)"):
        intruders(base, delta.T)
    for top in (0, 49):
        with pytest.raises(SpecError, match=r"top must be from 1 to min\(m, n\) = 48, not"):
            intruders(base, delta, top=top)
    with pytest.raises(SpecError, match="epsilon is a cosine, from 0 to 1, not 1.5"):
        intruders(base, delta, epsilon=1.5)
    with pytest.raises(SpecError, match="keep is what is left of an intruder, from 0 to 1, not 2"):
        intruders(base, delta).mitigation(2.0)
