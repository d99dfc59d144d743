"""The amplification factor: planted, the paper's own numbers, and what random directions hold."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lorakit.core.site import Site
from lorakit.core.state import Update
from lorakit.errors import SpecError
from lorakit.methods.lora import LoRA
from lorakit.spectral.amplification import Projections, amplification, projection, random_projection
from lorakit.spectral.subspace import random_directions
from lorakit.spectral.svd import Svd, svd
from tests.tolerances import assert_close


def planted(weight: Tensor, places: list[int], times: float) -> Svd:
    """Return the triplets of a LoRA that is `times` the directions of the weight at these places."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    p = {"down": vh[places], "up": times * u[:, places] * s[places]}
    return svd(Update(Site("layer", *weight.shape), LoRA(len(places), float(len(places))), p))


@pytest.mark.parametrize("places", [[0], [5], [31], [2, 9, 17]])
def test_a_planted_factor_is_recovered(places: list[int]) -> None:
    weight = torch.randn(48, 32, dtype=torch.float64)
    found = amplification(planted(weight, places, 7.0), weight)
    assert found.factor == pytest.approx(7.0)
    assert found.rank == len(places)
    sigma = torch.linalg.svdvals(weight)
    assert found.update == pytest.approx(float(sigma[places].norm()))
    assert found.weight == pytest.approx(float(sigma[: len(places)].norm()))
    assert found.weight_norm == pytest.approx(float(weight.norm()))


def test_the_paper_s_table_7() -> None:
    r4 = Projections(4, update=0.32, weight=21.67, random=0.02, update_norm=6.91, weight_norm=61.95)
    r64 = Projections(64, update=1.90, weight=37.71, random=0.33, update_norm=3.57, weight_norm=61.95)
    assert r4.factor == pytest.approx(21.5, abs=0.1)
    assert r64.factor == pytest.approx(1.88, abs=0.01)
    # the printed row of random directions follows from |W| alone
    assert random_projection(61.95, 12288, 12288, 4) == pytest.approx(0.0202, abs=5e-5)
    assert random_projection(61.95, 12288, 12288, 64) == pytest.approx(0.3227, abs=5e-5)


def test_random_directions_hold_what_the_formula_says() -> None:
    weight, rng = torch.randn(60, 40, dtype=torch.float64), torch.Generator().manual_seed(0)
    squares = torch.tensor([
        projection(random_directions(5, 60, rng).T, weight, random_directions(5, 40, rng)) ** 2 for _ in range(400)
    ])  # fmt: skip
    expected = random_projection(float(weight.norm()), 60, 40, 5) ** 2
    assert abs(float(squares.mean()) - expected) < 4 * float(squares.std()) / math.sqrt(400)


def test_the_three_rows_stand_in_order() -> None:
    weight = torch.randn(48, 32)
    found = amplification(planted(weight, [20, 25], 3.0), weight)
    assert found.random < found.update < found.weight < found.weight_norm
    assert found.random == pytest.approx(float(weight.norm()) * 2 / math.sqrt(48 * 32))


def test_fewer_directions_than_dw_has() -> None:
    weight = torch.randn(48, 32, dtype=torch.float64)
    update = planted(weight, [1, 4, 8], 2.0)
    found, sigma = amplification(update, weight, rank=1), torch.linalg.svdvals(weight)
    assert found.update == pytest.approx(float(sigma[1]))
    assert found.update_norm == pytest.approx(2 * float(sigma[[1, 4, 8]].norm())), "all of dW stands above the line"


def test_a_weight_without_these_directions_is_amplified_without_end() -> None:
    p = {"down": torch.eye(4)[:1], "up": torch.eye(4)[:, :1]}
    update = svd(Update(Site("layer", 4, 4), LoRA(1, 1.0), p))
    assert amplification(update, torch.diag(torch.tensor([0.0, 1.0, 1.0, 1.0]))).factor == math.inf


def test_its_own_directions_by_a_randomised_svd() -> None:
    weight = torch.randn(80, 60) @ torch.diag(0.9 ** torch.arange(60.0))
    update = planted(weight, [3, 5], 7.0)
    exact = amplification(update, weight)
    near = amplification(update, weight, iterations=8, rng=torch.Generator().manual_seed(0))
    assert near.weight == pytest.approx(exact.weight, rel=1e-4)
    assert (near.update, near.random) == (exact.update, exact.random)


def test_16_bit_weights_are_projected_in_fp32() -> None:
    weight = torch.randn(48, 32).bfloat16()
    update = planted(weight.float(), [3, 5], 7.0)
    assert amplification(update, weight).factor == pytest.approx(7.0, rel=1e-4)


def test_the_projection_is_at_most_the_norm() -> None:
    weight = torch.randn(6, 6)
    assert_close(torch.tensor(projection(torch.eye(6), weight, torch.eye(6))), weight.norm())


def test_what_has_no_factor_is_refused() -> None:
    weight = torch.randn(48, 32)
    with pytest.raises(SpecError, match=r"the weight is \(32, 48\), and dW \(48, 32\); give matrix_view"):
        amplification(planted(weight, [0], 1.0), weight.T)
    with pytest.raises(SpecError, match="dW is 0, so it has no directions"):
        amplification(planted(weight, [0], 0.0), weight)
    with pytest.raises(SpecError, match="3 directions were asked for, and 2 act"):
        amplification(planted(weight, [0, 1], 1.0), weight, rank=3)
