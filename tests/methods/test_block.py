"""Block-diagonal LoRA: torch.block_diag is the oracle, one block is LoRA, and shards add nothing to each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.core.spec import AdapterSpec, Targets
from lorakit.errors import SpecError
from lorakit.inject.attach import adapters_named, attach
from lorakit.methods.block import BlockDiagonal
from lorakit.methods.lora import LoRA
from tests.law.cases import Net, jitter
from tests.tolerances import assert_close

SIDES = ["up", "down", "both"]


def factors(method: BlockDiagonal, out: int = 8, in_: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return random stored factors at a layer and their dW."""
    model = Net(nn.Linear(in_, out))
    attach(model, AdapterSpec(method, Targets("layer")))
    adapter = adapters_named(model, "default")[0]
    jitter(adapter)
    down, up = (adapter.get_parameter(name).detach() for name in ("down", "up"))
    return down, up, adapter.delta(torch.zeros(out, in_)).detach()


def test_one_case_by_hand() -> None:
    # two blocks of rank 1, s = 4 / 2: outputs 0, 1 see inputs 0, 1 through (1, 2)^T (3, 4), the others their own
    method = BlockDiagonal(rank=2, alpha=4.0, blocks=2)
    down, up = torch.tensor([[3.0, 4.0], [5.0, 6.0]]), torch.tensor([[1.0], [2.0], [1.0], [-1.0]])
    left, right = method.factors({"down": down, "up": up})[::-1]
    assert (left @ right).tolist() == [
        [6.0, 8.0, 0.0, 0.0],
        [12.0, 16.0, 0.0, 0.0],
        [0.0, 0.0, 10.0, 12.0],
        [0.0, 0.0, -10.0, -12.0],
    ]


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("side", SIDES)
def test_dw_is_lora_s_with_block_diag_factors(side: Any, stabilised: bool) -> None:
    method = BlockDiagonal(rank=4, alpha=6.0, blocks=2, side=side, stabilised=stabilised)
    down, up, delta = factors(method)
    full_down = torch.block_diag(down[:2], down[2:]) if side != "up" else down  # type: ignore[no-untyped-call]
    full_up = torch.block_diag(up[:4], up[4:]) if side != "down" else up  # type: ignore[no-untyped-call]
    assert full_down.shape == (4, 12)
    assert full_up.shape == (8, 4)
    assert_close(delta, (6.0 / (2.0 if stabilised else 4.0)) * full_up @ full_down)


@pytest.mark.parametrize("side", SIDES)
def test_one_block_is_lora(side: Any) -> None:
    down, up, delta = factors(BlockDiagonal(rank=4, alpha=6.0, blocks=1, side=side))
    lora_down, lora_up = LoRA(4, 6.0).factors({"down": down, "up": up})
    assert_close(delta, lora_up @ lora_down)


def test_shards_of_the_outputs_put_side_by_side_are_the_whole_output() -> None:
    down, up, delta = factors(BlockDiagonal(rank=4, alpha=4.0, blocks=4, side="up"))
    x = torch.randn(5, 12)
    shards = [x @ down[i : i + 1].T @ up[2 * i : 2 * i + 2].T for i in range(4)]  # one device each, all of x
    assert_close(torch.cat(shards, 1), x @ delta.T)


def test_shards_of_the_inputs_add_up_before_one_last_product() -> None:
    down, up, delta = factors(BlockDiagonal(rank=4, alpha=4.0, blocks=4, side="down"))
    x = torch.randn(5, 12)
    hidden = [x[:, 3 * i : 3 * i + 3] @ down[i : i + 1].T for i in range(4)]  # each device its own inputs
    assert_close(torch.cat(hidden, 1) @ up.T, x @ delta.T)


def test_both_sides_leave_everything_off_the_blocks_alone() -> None:
    _, _, delta = factors(BlockDiagonal(rank=4, alpha=4.0, blocks=2))
    assert delta[:4, :6].all()
    assert delta[4:, 6:].all()
    assert not delta[:4, 6:].any()
    assert not delta[4:, :6].any()


@pytest.mark.parametrize(("side", "bound"), [("up", 1 / 12), ("down", 6 / 6), ("both", 1 / 6)])
def test_a_starts_within_its_bound(side: Any, bound: float) -> None:
    # sqrt(1/k) for the k inputs of a row; the authors' sqrt(6/k) on side down
    torch.manual_seed(3)
    model = Net(nn.Linear(12, 512))
    attach(model, AdapterSpec(BlockDiagonal(rank=12, blocks=2, side=side), Targets("layer")))
    adapter = adapters_named(model, "default")[0]
    largest = adapter.get_parameter("down").abs().max()
    assert 0.9 * math.sqrt(bound) < largest <= math.sqrt(bound)
    assert not adapter.get_parameter("up").any()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1"),
        ({"alpha": 0.0}, "alpha must be a positive number"),
        ({"blocks": 0}, "blocks must be a whole number of at least 1, not 0; 1 is LoRA"),
        ({"rank": 6, "blocks": 4}, "rank 6 does not divide into 4 blocks; use rank 8"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        BlockDiagonal(**fields)


@pytest.mark.parametrize(
    ("side", "told"),
    [
        ("up", "layer: its 10 outputs do not divide into 4 blocks; use blocks 1 or 2 at rank 8, or exclude this path"),
        ("down", "layer: its 18 inputs do not divide into 4 blocks; use blocks 1 or 2 at rank 8, or exclude this path"),
    ],
)
def test_a_layer_the_blocks_do_not_divide_is_refused_with_what_would(side: Any, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        attach(Net(nn.Linear(18, 10)), AdapterSpec(BlockDiagonal(8, 8.0, blocks=4, side=side), Targets("layer")))


def test_one_sided_blocks_ask_nothing_of_the_other_size() -> None:
    attach(Net(nn.Linear(7, 8)), AdapterSpec(BlockDiagonal(4, 4.0, blocks=4, side="up"), Targets("layer")))
    attach(Net(nn.Linear(8, 7)), AdapterSpec(BlockDiagonal(4, 4.0, blocks=4, side="down"), Targets("layer")))
