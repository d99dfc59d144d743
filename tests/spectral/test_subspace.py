"""Similarity of subspaces: the LoRA paper's phi by its definition, its laws and chance, and angles beside scipy's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorakit.errors import SpecError
from lorakit.spectral.subspace import (
    chance,
    directions,
    geodesic_distance,
    principal_angles,
    projection_distance,
    random_directions,
    similarities,
    similarity,
)
from tests.tolerances import assert_close

E = torch.eye(6, dtype=torch.float64)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def turned(degrees: float) -> Tensor:
    """Return e1 turned towards e3, and e2."""
    angle = math.radians(degrees)
    return torch.stack([math.cos(angle) * E[0] + math.sin(angle) * E[2], E[1]])


def test_by_hand() -> None:
    # span(e1, e2) and span(e1 at 60 degrees, e2): cosines 1 and 1/2, so phi = (1 + 1/4) / 2 and d^2 = 3/4
    assert similarity(E[:2], turned(60), 2, 2) == pytest.approx(5 / 8)
    assert similarity(E[:2], turned(60), 1, 1) == pytest.approx(1 / 4)
    assert similarity(E[:2], turned(60), 2, 1) == pytest.approx(1 / 4)
    assert_close(principal_angles(E[:2], turned(60)), torch.tensor([0.0, math.pi / 3], dtype=torch.float64))
    assert projection_distance(E[:2], turned(60)) == pytest.approx(math.sqrt(3) / 2)
    assert geodesic_distance(E[:2], turned(60)) == pytest.approx(math.pi / 3)


def test_the_definition() -> None:
    # eq. 4 with numpy: columns of right singular vectors, a Frobenius norm, min(i, j)
    a, b = torch.randn(8, 40), torch.randn(16, 40)
    u, v = (np.linalg.svd(t.double().numpy())[2].T for t in (a, b))
    grid = similarities(directions(a), directions(b))
    assert grid.shape == (8, 16)
    for i, j in ((1, 1), (3, 7), (8, 16), (8, 2)):
        expected = np.linalg.norm(u[:, :i].T @ v[:, :j]) ** 2 / min(i, j)
        assert similarity(directions(a), directions(b), i, j) == pytest.approx(expected, rel=1e-5)
        assert float(grid[i - 1, j - 1]) == pytest.approx(expected, rel=1e-5)


@given(n=st.integers(2, 24), r=st.integers(1, 24), s=st.integers(1, 24), seed=st.integers(0, 99))
def test_phi_and_distance_are_one_thing(n: int, r: int, s: int, seed: int) -> None:
    r, s = min(r, n), min(s, n)
    a, b = random_directions(r, n, rng(seed)), random_directions(s, n, rng(seed + 1))
    phi, p = similarity(a, b, r, s), min(r, s)
    assert -1e-12 <= phi <= 1 + 1e-12
    assert phi == pytest.approx(1 - projection_distance(a, b) ** 2 / p, abs=1e-12)
    assert phi == pytest.approx(similarity(b, a, s, r), abs=1e-12)
    assert_close(similarities(a, b), similarities(b, a).T, scale=1.0)
    assert principal_angles(a, b).tolist() == sorted(principal_angles(a, b).tolist())


@given(i=st.integers(1, 6), j=st.integers(1, 6))
def test_a_subspace_is_within_a_larger_one_of_itself(i: int, j: int) -> None:
    basis = random_directions(6, 20, rng(3))
    assert similarity(basis, basis, i, j) == pytest.approx(1)
    assert projection_distance(basis[:i], basis[:j]) == pytest.approx(0, abs=1e-12)


def test_orthogonal_ones_have_nothing_in_common() -> None:
    assert similarity(E[:2], E[2:5], 2, 3) == 0
    assert projection_distance(E[:2], E[2:5]) == pytest.approx(math.sqrt(2))
    assert geodesic_distance(E[:2], E[2:4]) == pytest.approx(math.pi / math.sqrt(2))


@pytest.mark.parametrize(("i", "j", "n"), [(8, 64, 500), (1, 1, 50), (5, 5, 20)])
def test_chance_is_the_mean_over_random_subspaces(i: int, j: int, n: int) -> None:
    draws = torch.tensor([
        similarity(random_directions(i, n, rng(2 * k)), random_directions(j, n, rng(2 * k + 1)), i, j)
        for k in range(400)
    ])  # fmt: skip
    assert chance(i, j, n) == max(i, j) / n
    assert abs(float(draws.mean()) - chance(i, j, n)) < 4 * float(draws.std()) / math.sqrt(400)  # 1 in 16,000 by chance


def test_the_directions_of_a_random_gaussian_are_random_directions() -> None:
    draws = torch.tensor([
        similarity(directions(torch.randn(4, 40)), directions(torch.randn(8, 40)), 4, 8) for _ in range(400)
    ])  # fmt: skip
    assert abs(float(draws.mean()) - 8 / 40) < 4 * float(draws.std()) / math.sqrt(400)


@pytest.mark.parametrize(("r", "s"), [(4, 4), (3, 7), (7, 3), (1, 9)])
@pytest.mark.parametrize("step", [1.0, 1e-3, 1e-9])
def test_angles_are_scipy_s(r: int, s: int, step: float) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    basis = random_directions(9, 30, rng(1))
    a, b = basis[:r], torch.linalg.qr((basis[:s] + step * random_directions(s, 30, rng(2))).T).Q.T
    expected = torch.from_numpy(np.sort(linalg.subspace_angles(a.numpy().T, b.numpy().T)))
    assert (principal_angles(a, b) - expected).abs().max() <= 1e-12 + 1e-6 * step
    if r == s:
        chordal = (a.T @ a - b.T @ b).norm() / math.sqrt(2)
        assert projection_distance(a, b) == pytest.approx(float(chordal), rel=1e-6, abs=1e-14)


def test_a_small_angle_is_not_rounded_to_nothing() -> None:
    tiny = torch.stack([E[0] + 1e-10 * E[2], E[1]])
    assert geodesic_distance(E[:2], tiny) == pytest.approx(1e-10, rel=1e-5)


def test_directions_are_the_right_singular_vectors_that_act() -> None:
    a = torch.randn(5, 12)
    a[3:] = 0.0
    assert_close(directions(a).abs(), torch.linalg.svd(a).Vh[:3].abs())
    assert directions(torch.zeros(4, 6)).shape == (0, 6)
    kernel = torch.randn(4, 3, 2, 2)
    assert torch.equal(directions(kernel), directions(kernel.flatten(1)))
    assert directions(a.bfloat16()).dtype == torch.float32


def test_a_subspace_without_directions_has_no_similarity() -> None:
    assert similarities(directions(torch.zeros(4, 6)), E[:2].float()).shape == (0, 2)
    with pytest.raises(SpecError, match="1 directions were asked for, and there are 0"):
        similarity(directions(torch.zeros(4, 6)), E[:2].float(), 1, 1)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(SpecError, match="directions of 6 and of 5 features lie in different spaces"):
        similarity(E, E[:, :5], 1, 1)
    with pytest.raises(SpecError, match="the rows are not orthonormal; give directions"):
        similarity(torch.randn(4, 6), E[:4].float(), 1, 1)
    with pytest.raises(SpecError, match="3 directions were asked for, and there are 2"):
        similarity(E[:4], E[:2], 3, 3)
    with pytest.raises(SpecError, match="0 directions were asked for"):
        similarity(E[:4], E[:2], 1, 0)
    with pytest.raises(SpecError, match="dimension 2 and 3 lie on no one Grassmannian"):
        geodesic_distance(E[:2], E[:3])
    with pytest.raises(SpecError, match="a subspace of dimension 7 is not within 1 to 6"):
        random_directions(7, 6)
    with pytest.raises(SpecError, match="not both within 1 to 10"):
        chance(3, 11, 10)
