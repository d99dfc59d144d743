"""The triplets of a product of thin factors: torch's SVD of the product, which is never formed here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.core.factored import block_diagonal, entropy_rank, factored, factored_values
from tests.tolerances import assert_close

EXACT = 1e-10
"""Of the largest singular value, in fp64: eps 2.2e-16 times a few hundred reordered terms, and four digits to spare."""


def pair(m: int, n: int, r: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    return torch.randn(r, n, dtype=torch.float64), torch.randn(m, r // groups, dtype=torch.float64)


def assert_triplets(down: Tensor, up: Tensor, product: Tensor) -> None:
    """Assert that what `factored` returns is an SVD of `product`, by every property that makes it one."""
    u, s, vh = factored(down, up)
    expected = torch.linalg.svdvals(product)
    scale = float(expected[0]) or 1.0
    assert (u @ s.diag() @ vh - product).abs().max() <= EXACT * scale
    assert (s - expected[: len(s)]).abs().max() <= EXACT * scale
    assert expected[len(s) :].sum() <= EXACT * scale, "what is left out is 0"
    for basis in (u.T, vh):
        assert (basis @ basis.T - torch.eye(len(s), dtype=s.dtype)).abs().max() <= EXACT
    assert (factored_values(down, up) - s).abs().max() <= EXACT * scale


@given(m=st.integers(1, 20), n=st.integers(1, 20), r=st.integers(1, 26), acting=st.integers(0, 26))
def test_the_triplets_are_those_of_the_product(m: int, n: int, r: int, acting: int) -> None:
    down, up = pair(m, n, r)
    up[:, acting:] = 0.0  # rank-deficient, down to 0
    assert len(factored(down, up)[1]) == min(m, n, r)
    assert_triplets(down, up, up @ down)


@pytest.mark.parametrize("r", [1, 8, 64, 100])
def test_they_agree_with_torch_where_torch_sees_the_product(r: int) -> None:
    down, up = pair(96, 64, r)
    assert_triplets(down, up, up @ down)
    _, s, vh = factored(down, up)
    theirs = torch.linalg.svd(up @ down).Vh[: min(r, 4)]
    assert ((vh[: len(theirs)] @ theirs.T).abs().diag() - 1).abs().max() < 1e-8, "the same directions, up to sign"
    assert s.dtype == torch.float64


def test_directions_repeated_and_nearly_repeated_stay_orthogonal() -> None:
    down, up = pair(40, 30, 6)
    down[3], up[:, 4] = down[2], up[:, 5] * (1 + 1e-9)
    assert_triplets(down, up, up @ down)


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e8, 1e30])
def test_factors_of_any_size(size: float) -> None:
    down, up = pair(12, 9, 4)
    assert_triplets(size * down, up / math.sqrt(size), (up / math.sqrt(size)) @ (size * down))


def test_a_kernel_is_part_of_the_columns() -> None:
    down, up = torch.randn(4, 3, 2, 2, dtype=torch.float64), torch.randn(10, 4, dtype=torch.float64)
    assert_triplets(down, up, up @ down.flatten(1))


def test_groups_are_blocks_of_one_matrix() -> None:
    down, up = torch.randn(6, 5, 2, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    blocks = [up[:4] @ down[:3].flatten(1), up[4:] @ down[3:].flatten(1)]
    assert_triplets(down, up, torch.block_diag(*blocks))
    assert_triplets(down[:, :, 0], up, torch.block_diag(up[:4] @ down[:3, :, 0], up[4:] @ down[3:, :, 0]))
    assert torch.equal(block_diagonal(torch.stack(blocks)), torch.block_diag(*blocks))


def test_by_hand() -> None:
    # up = 3 e1, 4 e2 as columns, down = e1, e2 as rows: singular values 4 and 3, in that order
    u, s, vh = factored(torch.eye(2, 3), torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]))
    assert_close(s, torch.tensor([4.0, 3.0], dtype=torch.float64))
    assert_close(u.abs(), torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
    assert_close(vh.abs(), torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64))


class Largest(TorchDispatchMode):
    """Remembers the most values that any result had."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            self.values = max(self.values, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return out


def test_the_product_is_never_formed() -> None:
    down, up = torch.randn(4, 300), torch.randn(200, 4)
    with Largest() as seen:
        factored(down, up)
        factored_values(down, up)
    assert seen.values == 4 * 300


def test_16_bit_factors_are_read_as_they_are() -> None:
    down, up = (t.bfloat16() for t in pair(12, 9, 4))
    assert_triplets(down, up, up.double() @ down.double())


def test_the_entropy_rank_by_hand() -> None:
    # p = 1/2, 1/4, 1/4: entropy 1.5 bits, 2^1.5
    assert float(entropy_rank(torch.tensor([2.0, 1.0, 1.0, 0.0]))) == pytest.approx(2**1.5)
    assert float(entropy_rank(torch.zeros(3))) == 1.0
    assert float(entropy_rank(torch.tensor([1e300, 1e-300], dtype=torch.float64))) == pytest.approx(1.0)
