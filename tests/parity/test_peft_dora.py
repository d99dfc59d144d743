"""Parity of DoRA with PEFT: same tensors, same outputs, gradients, starts and merged weights, on each layer kind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.core.spec import AdapterSpec, Targets
from lorakit.inject.attach import adapters_named, attach
from lorakit.inject.merge import merge
from lorakit.methods.dora import DoRA
from lorakit.methods.lora import LoRA
from tests.law.cases import Kind, Net, jitter
from tests.parity.test_peft_forward import SHARED
from tests.tolerances import assert_close

UNGROUPED = {
    kind: SHARED[kind] for kind in SHARED if kind != "module" and getattr(SHARED[kind].layer(), "groups", 1) == 1
}
"""PEFT 0.21's DoRA multiplies the factors of a convolution without its groups."""


def ours_and_peft(kind: Kind, dtype: torch.dtype, moved: bool = True) -> tuple[Net, Any]:
    """Return two models of one layer, one adapted by lorakit and one by PEFT, with the same factors, moved or not."""
    from peft import LoraConfig, get_peft_model

    ours = Net(kind.layer()).to(dtype)
    transposed = type(ours.layer).__name__ == "Conv1D"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["layer"], use_dora=True, fan_in_fan_out=transposed)
    theirs: Any = get_peft_model(copy.deepcopy(ours), config)  # type: ignore[arg-type]
    theirs.to(dtype)
    attach(ours, AdapterSpec(DoRA(LoRA(4, 8.0)), Targets("layer")))
    if moved:
        jitter(adapters_named(ours, "default")[0])
        with torch.no_grad():
            for name, parameter in adapted_parameters(theirs):
                parameter.copy_(as_ours(ours, name).reshape(parameter.shape))
    return ours, theirs


def adapted_parameters(theirs: Any) -> list[tuple[str, Tensor]]:
    """Return PEFT's tensors of the adapter by name."""
    return [(name, parameter) for name, parameter in theirs.named_parameters() if "lora_" in name]


def as_ours(ours: Net, name: str) -> Tensor:
    """Return our tensor for a name of PEFT's."""
    own = "magnitude" if "magnitude" in name else "down" if "_A" in name else "up"
    return adapters_named(ours, "default")[0].get_parameter(own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", UNGROUPED)
def test_outputs_and_gradients_equal_peft_s(kind: str, dtype: torch.dtype) -> None:
    ours, theirs = ours_and_peft(UNGROUPED[kind], dtype)
    x = UNGROUPED[kind].inputs()
    x = x.to(dtype) if x.is_floating_point() else x
    y, z = ours(x), theirs(x)
    assert y.dtype == z.dtype == dtype
    assert_close(y, z)
    if dtype == torch.float32:
        assert (y - z).abs().max() <= 1e-6 * z.abs().max()
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    (z * direction).sum().backward()
    for name, parameter in adapted_parameters(theirs):
        mine = as_ours(ours, name).grad
        assert mine is not None
        assert_close(mine.reshape(parameter.shape), parameter.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", UNGROUPED)
def test_m_starts_where_peft_s_does(kind: str) -> None:
    ours, theirs = ours_and_peft(UNGROUPED[kind], torch.float32, moved=False)
    (magnitude,) = (parameter for name, parameter in adapted_parameters(theirs) if "magnitude" in name)
    assert_close(as_ours(ours, "magnitude").reshape(magnitude.shape), magnitude.detach())


@pytest.mark.parametrize("kind", UNGROUPED)
def test_merged_weights_equal_peft_s(kind: str) -> None:
    ours, theirs = ours_and_peft(UNGROUPED[kind], torch.float32)
    merge(ours)
    merged = theirs.merge_and_unload().layer
    assert_close(ours.layer.get_parameter("weight"), merged.get_parameter("weight"))
