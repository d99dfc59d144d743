"""Updates of single rows equal the loop over the rows, whichever way they are grouped."""

from __future__ import annotations

import pytest
import torch

from lorakit.kernels import grouped
from tests.tolerances import assert_close

N, IN, OUT = 6, 9, 7


def case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(N, OUT).to(dtype), torch.randn(N, IN).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_mixed_ranks_padded_with_zeros_equal_the_loop(dtype: torch.dtype) -> None:
    y, x = case(dtype)
    pairs = [None if r == 0 else (torch.randn(r, IN), torch.randn(r, OUT), 1.0 + r) for r in (0, 1, 4, 2, 4, 3)]
    down, up = torch.zeros(N, 4, IN), torch.zeros(N, 4, OUT)
    for row, pair in enumerate(pairs):
        if pair is not None:
            down[row, : len(pair[0])], up[row, : len(pair[1])] = pair[0], pair[2] * pair[1]
    wanted = grouped.each_row(y, x, pairs)
    grouped.rows(y, x, down, up)
    assert_close(y, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_read_a_narrower_part_of_wide_factors(dtype: torch.dtype) -> None:
    y, x = case(dtype)
    down, up = torch.randn(N, 16, IN), torch.randn(N, 16, OUT)
    wanted = grouped.each_row(y, x, [(d[:3], u[:3], 1.0) for d, u in zip(down, up, strict=True)])
    grouped.rows(y, x, down[:, :3], up[:, :3])
    assert_close(y, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_span_and_scattered_rows_equal_the_loop(dtype: torch.dtype) -> None:
    y, x = case(dtype)
    pair = torch.randn(3, IN), torch.randn(3, OUT), -0.5
    wanted = grouped.each_row(y, x, [None, None, pair, pair, pair, None])
    grouped.span(y[2:5], x[2:5], *pair)
    assert_close(y, wanted)
    wanted = grouped.each_row(y, x, [pair, None, None, pair, None, pair])
    grouped.scattered(y, x, torch.tensor([0, 3, 5]), *pair)
    assert_close(y, wanted)


def test_one_number_by_hand() -> None:
    y, x = torch.tensor([[1.0]]), torch.tensor([[2.0, 3.0]])
    grouped.span(y, x, torch.tensor([[1.0, 10.0]]), torch.tensor([[0.5]]), 2.0)
    assert y.item() == 1 + 2 * (2 + 30) * 0.5
