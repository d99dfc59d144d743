"""Parity with PEFT's BD-LoRA: the stored shapes, outputs and gradients, merged weights, and where A starts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.core.spec import AdapterSpec, Targets
from lorakit.inject.attach import adapters_named, attach
from lorakit.inject.merge import merge
from lorakit.methods.block import BlockDiagonal
from tests.law.cases import Net, jitter
from tests.tolerances import assert_close

SIDES = ["up", "down"]


def ours_and_peft(side: Any, layer: nn.Module, stabilised: bool = False) -> tuple[Net, Any]:
    """Return one layer adapted by lorakit and by PEFT, with the blocks on the same factor, both at their start."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import BdLoraConfig

    ours = Net(layer)
    blocks = BdLoraConfig(
        target_modules_bd_a=["layer"] if side == "down" else [],
        target_modules_bd_b=["layer"] if side == "up" else [],
        nblocks=2,
    )
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["layer"], use_rslora=stabilised, use_bdlora=blocks)
    theirs: Any = get_peft_model(copy.deepcopy(ours), config)  # type: ignore[arg-type]
    attach(ours, AdapterSpec(BlockDiagonal(4, 6.0, stabilised, 2, side), Targets("layer")))
    return ours, theirs


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("side", SIDES)
def test_outputs_gradients_and_merged_weights_equal_peft_s(side: str, stabilised: bool) -> None:
    ours, theirs = ours_and_peft(side, nn.Linear(12, 8), stabilised)
    adapter = adapters_named(ours, "default")[0]
    jitter(adapter)
    layer = theirs.base_model.model.layer
    pairs = [(adapter.get_parameter("down"), layer.lora_A["default"].weight)]
    pairs += [(adapter.get_parameter("up"), layer.lora_B["default"].weight)]
    for mine, other in pairs:
        assert mine.shape == other.shape
        other.data.copy_(mine)
    x = torch.randn(3, 5, 12)
    y, z = ours(x), theirs(x)
    assert_close(y, z)
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    (z * direction).sum().backward()
    for mine, other in pairs:
        assert_close(mine.grad, other.grad)
    merge(ours)
    assert_close(ours.layer.weight, theirs.merge_and_unload().layer.weight)


@pytest.mark.parametrize(("side", "bound"), [("up", 0.0361), ("down", 0.125)])
def test_peft_starts_within_the_same_bounds(side: str, bound: float) -> None:
    # up: 1/sqrt(768) = 0.03608; down: sqrt(6 / 384) = 0.125
    ours, theirs = ours_and_peft(side, nn.Linear(768, 8))
    adapter, layer = adapters_named(ours, "default")[0], theirs.base_model.model.layer
    for sample in (adapter.get_parameter("down"), layer.lora_A["default"].weight):
        assert 0.98 * bound < sample.abs().max() <= bound
    assert not adapter.get_parameter("up").any()
    assert not layer.lora_B["default"].weight.any()
