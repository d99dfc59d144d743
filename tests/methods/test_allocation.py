"""Shares of rank and resized pairs, against cases worked out by hand and the theorem of Eckart and Young."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import SpecError
from lorakit.methods.allocation import allocate, resize
from tests.tolerances import assert_close

any_scores = st.lists(st.one_of(st.just(0.0), st.floats(1e-12, 1e12)), min_size=1, max_size=24)


@pytest.mark.parametrize(
    ("scores", "budget", "limits", "ranks"),
    [
        ((0.6, 0.25, 0.1, 0.05), 32, (1, 16), [16, 10, 4, 2]),  # x = 40: the first stands at its limit
        ((0.5, 0.3, 0.15, 0.05), 10, (1, 8), [5, 3, 1, 1]),  # x = 9 / 0.95: 4.74, 2.84, 1.42 and the lower limit
        ((0.97, 0.01, 0.01, 0.01), 32, (2, 16), [16, 6, 5, 5]),  # 5.33 thrice: the first of equal remainders
        ((2.0, 2.0, 2.0), 12, (1, 8), [4, 4, 4]),
        ((0.0, 0.0, 0.0), 9, (1, 8), [3, 3, 3]),
        ((1.0, 0.0, 0.0), 20, (1, 8), [8, 6, 6]),  # what the limit leaves goes somewhere
        ((1.0, 2.0), 2, (1, 8), [1, 1]),
        ((1.0, 2.0), 16, (1, 8), [8, 8]),
        ((1.0,), 0, (0, 8), [0]),
    ],
)
def test_ranks_by_hand(scores: Sequence[float], budget: int, limits: tuple[int, int], ranks: list[int]) -> None:
    assert allocate(scores, budget, *limits) == ranks


@given(scores=any_scores, low=st.integers(0, 4), width=st.integers(0, 20), part=st.floats(0, 1))
def test_the_budget_is_met_exactly_within_the_limits(scores: list[float], low: int, width: int, part: float) -> None:
    high, n = low + width, len(scores)
    budget = n * low + round(part * n * width)
    ranks = allocate(scores, budget, low, high)
    assert sum(ranks) == budget
    assert all(low <= rank <= high for rank in ranks)
    for one, r in zip(scores, ranks, strict=True):
        assert all(r <= other + 1 for more, other in zip(scores, ranks, strict=True) if more >= one)


@given(scores=any_scores, order=st.randoms(use_true_random=False), part=st.floats(0, 1))
def test_the_order_of_the_sites_does_not_matter(scores: list[float], order: random.Random, part: float) -> None:
    budget, places = len(scores) + round(part * 7 * len(scores)), list(range(len(scores)))
    order.shuffle(places)
    ranks, moved = allocate(scores, budget, 1, 8), allocate([scores[i] for i in places], budget, 1, 8)
    assert sorted(moved) == sorted(ranks)
    assert all(abs(ranks[i] - rank) <= 1 for i, rank in zip(places, moved, strict=True))  # equal remainders: the first


def test_each_score_keeps_its_rank_wherever_it_stands() -> None:
    scores = [0.31, 4.0, 1.7, 0.9, 2.6, 0.05]
    by_score = dict(zip(scores, allocate(scores, 24, 1, 8), strict=True))
    for _ in range(20):
        random.shuffle(scores)
        assert allocate(scores, 24, 1, 8) == [by_score[s] for s in scores]


def test_costs_are_what_the_budget_counts() -> None:
    # both shares are 4.5, their floors cost 4 * 10 + 4 * 30 = 160 of 180: one more of the first fits, not of the second
    assert allocate((1.0, 1.0), 180, 1, 8, costs=(10, 30)) == [5, 4]
    assert allocate((1.0, 1.0), 40 * 5, 1, 8, costs=(10, 30)) == [5, 5]


@given(
    sites=st.lists(st.tuples(st.floats(0, 10), st.integers(1, 99)), min_size=1, max_size=12),
    low=st.integers(1, 3),
    part=st.floats(0, 1),
)
def test_with_costs_the_budget_is_kept_and_nearly_spent(sites: list[tuple[float, int]], low: int, part: float) -> None:
    scores, costs = [s for s, _ in sites], [c for _, c in sites]
    budget = low * sum(costs) + round(part * 9 * sum(costs))
    spent = sum(c * r for c, r in zip(costs, allocate(scores, budget, low, low + 9, costs), strict=True))
    assert budget - max(costs) < spent <= budget


@pytest.mark.parametrize("budget", [3, 33])
def test_a_budget_out_of_reach_is_refused_with_the_reachable_range(budget: int) -> None:
    with pytest.raises(
        SpecError, match=rf"budget of {budget} .* 4 ranks of 1 to 8, which cost 4 to 32; choose a budget"
    ):
        allocate((1.0, 2.0, 3.0, 4.0), budget, 1, 8)


@pytest.mark.parametrize("score", [-1.0, math.nan, math.inf])
def test_a_score_that_is_none_is_refused(score: float) -> None:
    with pytest.raises(SpecError, match="scores must be finite numbers of at least 0"):
        allocate((1.0, score), 4, 1, 8)


def pair(now: int, high: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a pair of `high` directions of which the first `now` act; the others are at 0."""
    down, up = torch.randn(high, 12), torch.randn(9, high)
    up[:, now:] = 0.0
    return down, up, (torch.arange(high) < now).float()


@pytest.mark.parametrize("rank", [4, 5, 6])
def test_growing_keeps_the_update(rank: int) -> None:
    down, up, gate = pair(4)
    before, spare = (up * gate) @ down, down[4:].clone()
    resize(down, up, gate, rank)
    assert gate.tolist() == [1.0] * rank + [0.0] * (6 - rank)
    assert ((up * gate) @ down - before).norm() <= 1e-6 * before.norm()
    assert torch.equal(down[4:], spare), "new directions start where they were drawn, with up 0"
    assert not up[:, 4:].any()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_shrinking_leaves_the_best_approximation(rank: int) -> None:
    down, up, gate = pair(4)
    before = (up * gate) @ down
    tail = torch.linalg.svdvals(before)[rank:].square().sum()
    resize(down, up, gate, rank)
    after = (up * gate) @ down
    assert int(torch.linalg.matrix_rank(after)) == rank
    assert_close((after - before).square().sum(), tail)
    resize(down, up, gate, 4)
    assert_close((up * gate) @ down, after)


def test_every_row_of_a_resized_pair_has_the_size_a_row_had() -> None:
    down, up, gate = pair(4)
    size = down[:4].norm() / 2
    resize(down, up, gate, 2)
    assert_close(down[:4].norm(dim=1), size.expand(4))


def test_a_pair_that_has_learned_nothing_can_be_resized() -> None:
    down, up, gate = torch.randn(6, 12), torch.zeros(9, 6), (torch.arange(6) < 4).float()
    resize(down, up, gate, 2)
    assert down.isfinite().all()
    assert not up.any()
