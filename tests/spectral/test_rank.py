"""Energy and effective ranks: by hand, equal ones, any scale, and the order in which they weigh the tail."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorakit.errors import SpecError
from lorakit.spectral.rank import (
    EFFECTIVE_RANKS,
    energy,
    entropy_rank,
    is_dead,
    is_saturated,
    nuclear_rank,
    numerical_rank,
    participation_ratio,
    rank_at,
    stable_rank,
)
from tests.tolerances import assert_close

HAND = torch.tensor([2.0, 1.0, 1.0, 0.0])
spectra = st.lists(st.floats(0, 1e3), min_size=1, max_size=24).filter(any)


def test_by_hand() -> None:
    # sigma = 2, 1, 1, 0: sum 4, sum of squares 6, of fourth powers 18; p = 1/2, 1/4, 1/4
    assert entropy_rank(HAND) == pytest.approx(2 * math.sqrt(2))
    assert stable_rank(HAND) == pytest.approx(6 / 4)
    assert participation_ratio(HAND) == pytest.approx(36 / 18)
    assert nuclear_rank(HAND) == pytest.approx(16 / 6)
    assert_close(energy(HAND), torch.tensor([4 / 6, 5 / 6, 1, 1], dtype=torch.float64))
    assert [rank_at(HAND, share) for share in (0.5, 0.7, 0.9, 1.0)] == [1, 2, 3, 3]


def test_the_paper_s_weight_is_not_low_rank() -> None:
    # |W_q| = 61.95 in layer 48 of GPT-3, of which the first 4 directions hold 21.67, the first 64 of 12,288 37.71
    first, rest = 21.67 / 2, math.sqrt((37.71**2 - 21.67**2) / 60)
    tail = math.sqrt((61.95**2 - 37.71**2) / (12288 - 64))
    curve = energy(torch.tensor([first] * 4 + [rest] * 60 + [tail] * (12288 - 64)))
    assert float(curve[3]) == pytest.approx(0.122, abs=5e-4)
    assert float(curve[63]) == pytest.approx(0.371, abs=5e-4)


@pytest.mark.parametrize("n", [1, 2, 7, 64])
@pytest.mark.parametrize("name", EFFECTIVE_RANKS)
def test_n_equal_ones_are_n(name: str, n: int) -> None:
    assert EFFECTIVE_RANKS[name](torch.linalg.svdvals(torch.eye(n))) == pytest.approx(n)


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_n_equal_ones_hold_equal_energy(n: int) -> None:
    assert [rank_at(torch.ones(n), j / n) for j in range(1, n + 1)] == list(range(1, n + 1))


@given(values=spectra)
def test_they_weigh_the_tail_in_a_fixed_order(values: list[float]) -> None:
    sigma = torch.tensor(values, dtype=torch.float64)
    ranks = [f(sigma) for f in (stable_rank, participation_ratio, nuclear_rank, entropy_rank)]
    for less, more in zip([1.0, *ranks], [*ranks, float((sigma > 0).sum())], strict=True):
        assert less <= more * (1 + 1e-9)


@given(values=spectra, size=st.sampled_from([1e-300, 1e-40, 1e-5, 1e5, 1e40, 1e300]), order=st.randoms())
def test_neither_scale_nor_order_nor_zeros_matter(values: list[float], size: float, order: object) -> None:
    sigma = torch.tensor([v if v > 1e-3 else 0.0 for v in values], dtype=torch.float64)
    changed = torch.cat([sigma.flip(0) * size / 1e4, torch.zeros(2, dtype=torch.float64)])
    for rank in EFFECTIVE_RANKS.values():
        assert rank(changed) == pytest.approx(rank(sigma), rel=1e-9)
    assert_close(energy(changed)[: len(sigma)], energy(sigma))


@given(values=spectra, share=st.floats(1e-3, 1.0))
def test_the_rank_at_a_share_is_the_first_that_holds_it(values: list[float], share: float) -> None:
    sigma = torch.tensor(values, dtype=torch.float64)
    curve, rank = [0.0, *energy(sigma).tolist()], rank_at(sigma, share)
    assert curve[rank] >= share > curve[rank - 1]
    assert curve == sorted(curve)


def test_an_update_of_0_has_no_rank() -> None:
    zero = torch.zeros(4)
    assert [rank(zero) for rank in EFFECTIVE_RANKS.values()] == [0.0] * 4
    assert (rank_at(zero), rank_at(zero, 1.0), numerical_rank(zero, 9, 8)) == (0, 0, 0)
    assert energy(zero).tolist() == [0.0] * 4
    assert is_dead(zero)
    assert not is_saturated(zero)
    assert not is_dead(torch.tensor([1e-30, 0.0])), "small is not dead: only what never moved is"


def test_saturated_is_spread_over_nearly_all_directions() -> None:
    assert is_saturated(torch.ones(8))
    assert not is_saturated(torch.tensor([1.0] * 6 + [0.0] * 2)), "6 of 8 are below 0.9"
    assert is_saturated(torch.tensor([1.0] * 6 + [0.0] * 2), share=0.7)
    assert not is_saturated(HAND), "2.83 of 4"
    assert not is_saturated(torch.ones(1)), "one direction tells nothing of others"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_numerical_rank_is_torch_s(dtype: torch.dtype) -> None:
    for rank in (0, 1, 5):
        matrix = torch.randn(20, rank, dtype=dtype) @ torch.randn(rank, 30, dtype=dtype)
        expected = int(torch.linalg.matrix_rank(matrix))
        assert numerical_rank(torch.linalg.svdvals(matrix), 20, 30) == expected == rank


@pytest.mark.parametrize(
    "bad", [torch.tensor([1.0, math.nan]), torch.tensor([math.inf]), torch.tensor([-1.0]), HAND[:0]]
)
def test_what_are_no_singular_values_is_refused(bad: Tensor) -> None:
    for function in (energy, rank_at, is_dead, is_saturated, *EFFECTIVE_RANKS.values()):
        with pytest.raises(SpecError, match="singular values must be finite numbers of at least 0"):
            function(bad)


@pytest.mark.parametrize("share", [0, -0.1, 1.1, math.nan])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(SpecError, match="share must be above 0 and at most 1"):
        rank_at(HAND, share)
