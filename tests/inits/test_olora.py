"""OLoRA: the leading part of a QR decomposition, by hand and on the layouts weights are kept in."""

from __future__ import annotations

import pytest
import torch

from lorakit.inits.olora import OLoRA
from tests.inits.samples import started
from tests.inits.test_pissa import product, start_of
from tests.law.cases import weight_of
from tests.tolerances import assert_close


def test_one_case_by_hand() -> None:
    # W = [[3, 1], [4, 2]]: q = (3, 4) / 5, r = q^T W = (5, 2.2), whatever the scale; q r = [[3, 1.32], [4, 1.76]]
    down, up = start_of(torch.tensor([[3.0, 1.0], [4.0, 2.0]]), 1, 4.0, OLoRA())
    assert_close(up.abs(), torch.tensor([[0.6], [0.8]]))
    assert_close(up @ down, torch.tensor([[3.0, 1.32], [4.0, 1.76]]))


def test_b_is_orthonormal_and_the_first_columns_of_w_are_met() -> None:
    weight = torch.randn(20, 30)
    down, up = start_of(weight, 4, 8.0, OLoRA())
    assert_close(up.T @ up, torch.eye(4))
    assert_close((up @ down)[:, :4], weight[:, :4])


@pytest.mark.parametrize("kind", ["linear", "transposed-linear", "embedding", "conv2d"])
def test_every_layout_is_factored_as_out_by_in(kind: str) -> None:
    model, adapter, _, _ = started(kind, "olora")
    up = adapter.get_parameter("up").detach()
    assert_close(up.T @ up, torch.eye(4))
    columns = product(adapter).flatten(1)[:, :4] / 2.0  # s
    assert_close(columns, weight_of(model).flatten(1)[:, :4])
