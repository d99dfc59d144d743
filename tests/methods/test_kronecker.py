"""The Kronecker mathematics LoKr and KronA share, against torch.kron and its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from lorakit.methods.kronecker import factorization, kron, kron_times
from tests.tolerances import assert_close


def test_the_blocks_are_those_of_the_definition() -> None:
    w1, w2 = torch.randn(2, 3), torch.randn(4, 5, 2, 2)
    whole = kron(w1, w2)
    assert whole.shape == (8, 15, 2, 2)
    for i in range(2):
        for j in range(3):
            assert torch.equal(whole[4 * i : 4 * i + 4, 5 * j : 5 * j + 5], w1[i, j] * w2)


@given(
    a=st.integers(1, 5),
    b=st.integers(1, 5),
    c=st.integers(1, 5),
    e=st.integers(1, 5),
    rank=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_the_fast_product_equals_torch_kron(a: int, b: int, c: int, e: int, rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    w1, left, right = torch.randn(a, c).double(), torch.randn(b, rank).double(), torch.randn(rank, e).double()
    x = torch.randn(2, 3, c * e).double()
    wanted = x @ torch.kron(w1, left @ right).T
    scale = float(torch.kron(w1.abs(), left.abs() @ right.abs()).sum(1).max() * x.abs().max())
    assert_close(kron_times(x, w1, left, right), wanted, scale=scale)
    assert_close(kron_times(x, w1, left @ right), wanted, scale=scale)


@pytest.mark.parametrize(
    ("a", "c", "b", "e", "multiplications"),
    [
        (24, 24, 32, 32, 24 * 32 * 32 + 24 * 24 * 32),  # 768 x 768: 43,008 a token instead of 589,824
        (1, 768, 768, 1, 768 + 768),  # left first: a column times a row, which is a LoRA of rank 1
        (768, 1, 1, 768, 768 + 768),  # right first
    ],
)
def test_the_cheaper_order_is_taken(a: int, c: int, b: int, e: int, multiplications: int) -> None:
    x, w1, w2 = torch.randn(10, c * e), torch.randn(a, c), torch.randn(b, e)
    with FlopCounterMode(display=False) as counter:
        kron_times(x, w1, w2)
    assert counter.get_total_flops() == 2 * 10 * multiplications


def test_the_rank_is_the_product_of_the_ranks() -> None:
    w1, w2 = torch.randn(6, 2) @ torch.randn(2, 5), torch.randn(7, 3) @ torch.randn(3, 4)
    assert int(torch.linalg.matrix_rank(kron(w1, w2))) == 2 * 3


@pytest.mark.parametrize(
    ("width", "factor", "wanted"),
    [
        (768, None, (24, 32)),
        (768, 8, (8, 96)),
        (768, 96, (96, 8)),  # a factor that divides is taken as it is
        (768, 1000, (24, 32)),
        (128, 48, (8, 16)),
        (24, 5, (4, 6)),
        (127, None, (1, 127)),
        (1, None, (1, 1)),
    ],
)
def test_widths_are_cut(width: int, factor: int | None, wanted: tuple[int, int]) -> None:
    assert factorization(width, factor) == wanted
