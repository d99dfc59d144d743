"""Parity with PEFT, which we did not write: same factors, same outputs and gradients, on each layer kind."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.core.spec import AdapterSpec, Targets
from lorakit.inject.attach import adapters_named, attach
from lorakit.inject.merge import merge
from lorakit.methods.lora import LoRA
from tests.law.cases import DENSE, KINDS, Kind, Net, jitter
from tests.tolerances import assert_close

DIVERGING = ("conv1d", "conv2d, circular, no bias", "conv2d, grouped, reflected")
"""PEFT 0.21's convolutions drop the base's dilation and padding mode; the last test shows that they do."""
LAYERS = [kind for kind in DENSE if kind != "module"]
"""A module that holds layers has no low-rank update, here or in PEFT."""

SHARED = {kind: KINDS[kind] for kind in LAYERS if kind not in DIVERGING} | {
    "conv1d, strided": Kind(lambda: nn.Conv1d(12, 8, 3, padding=2, stride=2), lambda: torch.randn(3, 12, 9)),
    "conv2d, grouped": Kind(lambda: nn.Conv2d(12, 8, 3, groups=2, padding=1), lambda: torch.randn(3, 12, 7, 7)),
}


def ours_and_peft(kind: Kind, stabilised: bool = False) -> tuple[Net, Any]:
    """Return two models of one layer with the same random factors, one adapted by lorakit, one by PEFT."""
    from peft import LoraConfig, get_peft_model

    ours = Net(kind.layer())
    transposed = type(ours.layer).__name__ == "Conv1D"
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["layer"],
        use_rslora=stabilised,
        init_lora_weights=False,
        fan_in_fan_out=transposed,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LoRA adapter added to ConvNd layer with groups > 1")
        theirs: Any = get_peft_model(copy.deepcopy(ours), config)  # type: ignore[arg-type]
    attach(ours, AdapterSpec(LoRA(4, 8.0, stabilised), Targets("layer")))
    jitter(adapters_named(ours, "default")[0])
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(as_peft(ours, name).reshape(parameter.shape))
    return ours, theirs


def as_peft(ours: Net, name: str, grad: bool = False) -> Tensor:
    """Return our factor (or its gradient) in PEFT's layout.

    PEFT keeps the `down` of a grouped convolution ungrouped, `(r, in, *kernel)`; ours is its blocks on the diagonal.
    """
    adapter = adapters_named(ours, "default")[0]
    parameter = adapter.get_parameter("down" if "_A" in name else "up")
    values = parameter.grad if grad else parameter.detach()
    assert values is not None
    groups = adapter.site.groups
    if groups == 1 or "_B" in name:
        return values
    blocks = [block.transpose(0, 1).flatten(1) for block in values.chunk(groups)]
    dense = torch.block_diag(*blocks)  # (in, r * kernel)
    return dense.unflatten(1, (values.shape[0], -1)).transpose(0, 1).unflatten(2, values.shape[2:])


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("kind", SHARED)
def test_outputs_and_gradients_equal_peft_s(kind: str, stabilised: bool) -> None:
    ours, theirs = ours_and_peft(SHARED[kind], stabilised)
    x = SHARED[kind].inputs()
    y, z = ours(x), theirs(x)
    assert_close(y, z)
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    (z * direction).sum().backward()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            inside = as_peft(ours, name) != 0
            mine = as_peft(ours, name, grad=True)
            assert_close(mine.reshape(parameter.shape), parameter.grad * inside.reshape(parameter.shape))


@pytest.mark.parametrize("kind", [kind for kind in SHARED if SHARED[kind].layer().__dict__.get("groups", 1) == 1])
def test_merged_weights_equal_peft_s(kind: str) -> None:
    ours, theirs = ours_and_peft(SHARED[kind])
    merge(ours)
    merged: nn.Module = theirs.merge_and_unload().layer
    assert_close(ours.layer.get_parameter("weight"), merged.get_parameter("weight"))


def test_peft_starts_from_the_same_distribution() -> None:
    from peft import LoraConfig, get_peft_model

    peft: Any = get_peft_model(Net(nn.Linear(768, 768)), LoraConfig(r=64, target_modules=["layer"]))  # type: ignore[arg-type]
    theirs = peft.base_model.model.layer.lora_A["default"].weight
    ours = Net(nn.Linear(768, 768))
    attach(ours, AdapterSpec(LoRA(64), Targets("layer")))
    mine = adapters_named(ours, "default")[0].get_parameter("down")
    for sample in (mine, theirs):  # U(-1/sqrt(768), 1/sqrt(768)): bound 0.03608, std 0.02083
        assert 0.0360 < sample.abs().max() <= 0.03609
        assert abs(sample.std() - 0.02083) < 2e-4


def test_peft_still_forgets_padding_mode_and_dilation() -> None:
    # where this fails, PEFT has mended it: move the case to SHARED
    ours, theirs = ours_and_peft(KINDS["conv2d, circular, no bias"])
    x = KINDS["conv2d, circular, no bias"].inputs()
    assert not torch.allclose(ours(x), theirs(x), atol=1e-2)
    _, theirs = ours_and_peft(KINDS["conv1d"])
    with pytest.raises(RuntimeError, match="must match"):
        theirs(KINDS["conv1d"].inputs())
