"""Parity of IA3 with PEFT on both sides; and the one place where they part, the bias of a scaled output."""

from __future__ import annotations

import copy
import warnings
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from lorakit.core.spec import AdapterSpec, Targets
from lorakit.inject.attach import adapters_named, attach
from lorakit.inject.merge import merge
from lorakit.methods.ia3 import IA3
from tests.law.cases import DENSE, KINDS, Kind, Net, jitter
from tests.tolerances import assert_close

Side = Literal["output", "input"]
PEFT_KINDS = {kind: KINDS[kind] for kind in DENSE if kind.startswith(("linear", "transposed", "conv2d", "conv3d"))}
"""PEFT has no IA3 of an embedding or of a one-dimensional convolution."""


def unbiased(kind: Kind) -> nn.Module:
    """Return a layer of this kind whose bias is 0, where it has one."""
    layer = kind.layer()
    if getattr(layer, "bias", None) is not None:
        nn.init.zeros_(layer.get_parameter("bias"))
    return layer


def ours_and_peft(layer: nn.Module, side: Side) -> tuple[Net, Any, Tensor]:
    """Return two models of one layer with the same random factors, by lorakit and by PEFT, and PEFT's factors."""
    from peft import IA3Config, get_peft_model

    ours = Net(layer)
    config = IA3Config(
        target_modules=["layer"],
        feedforward_modules=["layer"] if side == "input" else [],
        fan_in_fan_out=type(layer).__name__ == "Conv1D",
    )
    theirs: Any = get_peft_model(copy.deepcopy(ours), config)
    attach(ours, AdapterSpec(IA3(side), Targets("layer")))
    (factors,) = (parameter for name, parameter in theirs.named_parameters() if "ia3_l" in name)
    gain = adapters_named(ours, "default")[0].get_parameter("gain")
    assert_close(gain.reshape(factors.shape), factors)
    jitter(adapters_named(ours, "default")[0])
    with torch.no_grad():
        factors.copy_(gain.reshape(factors.shape))
    return ours, theirs, factors


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_outputs_and_gradients_equal_peft_s(kind: str, side: Side) -> None:
    layer = PEFT_KINDS[kind].layer() if side == "input" else unbiased(PEFT_KINDS[kind])
    ours, theirs, factors = ours_and_peft(layer, side)
    x = PEFT_KINDS[kind].inputs()
    y, z = ours(x), theirs(x)
    assert_close(y, z)
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    (z * direction).sum().backward()
    grad = adapters_named(ours, "default")[0].get_parameter("gain").grad
    assert grad is not None
    assert factors.grad is not None
    assert_close(grad.reshape(factors.shape), factors.grad)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_merged_weights_equal_peft_s(kind: str, side: Side) -> None:
    ours, theirs, _ = ours_and_peft(PEFT_KINDS[kind].layer(), side)
    merge(ours)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*merge.*")
        merged = theirs.merge_and_unload().layer
    assert_close(ours.layer.get_parameter("weight"), merged.weight)


@pytest.mark.parametrize("kind", ["linear", "transposed-linear", "conv2d"])
def test_peft_s_output_side_scales_the_bias_too_and_ours_does_not(kind: str) -> None:
    # l (W x + b) against l W x + b: PEFT's is larger by exactly (l - 1) b, merged or not
    layer = KINDS[kind].layer()
    ours, theirs, factors = ours_and_peft(layer, "output")
    x = KINDS[kind].inputs()
    bias = layer.get_parameter("bias").detach()
    shape = (-1, *[1] * (ours(x).dim() - 2)) if kind == "conv2d" else (-1,)
    difference = ((factors.detach().flatten() - 1) * bias).view(shape).expand_as(ours(x))
    assert difference.abs().max() > 0.05
    assert_close(theirs(x) - ours(x), difference, scale=ours(x).abs().max().item())
    merge(ours)
    merged = theirs.merge_and_unload().layer
    assert_close(merged.bias - ours.layer.get_parameter("bias"), (factors.detach().flatten() - 1) * bias)
