"""Parity with PEFT's VeRA: the banks bit for bit, and outputs and merged weights from the same vectors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.core.spec import AdapterSpec, Targets
from lorakit.inject.attach import adapters_named, attach
from lorakit.inject.merge import merge
from lorakit.methods.vera import VeRA
from tests.tolerances import assert_close


class Mixed(nn.Module):
    """Layers of three shapes, all linear or all transposed, as PEFT's one `fan_in_fan_out` asks for."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        shapes = [(6, 8), (8, 5), (5, 10), (10, 5)]
        self.layers = nn.ModuleList(Conv1D(b, a) if transposed else nn.Linear(a, b) for a, b in shapes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the last layer's output."""
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def ours_and_peft(rank: int, key: int, transposed: bool) -> tuple[Mixed, Any]:
    """Return one model adapted by lorakit and by PEFT, both at their start."""
    from peft import VeraConfig, get_peft_model

    torch.manual_seed(0)
    ours = Mixed(transposed)
    names = ["layers.0", "layers.1", "layers.2", "layers.3"]
    config = VeraConfig(r=rank, target_modules=names, projection_prng_key=key, fan_in_fan_out=transposed)
    theirs: Any = get_peft_model(copy.deepcopy(ours), config)  # type: ignore[arg-type]
    attach(ours, AdapterSpec(VeRA(rank, key=key), Targets(names)))
    return ours, theirs


@pytest.mark.parametrize("key", [0, 7])
@pytest.mark.parametrize("rank", [4, 64])
def test_the_banks_are_peft_s_bit_for_bit(rank: int, key: int) -> None:
    ours, theirs = ours_and_peft(rank, key, transposed=False)
    a, b = theirs.base_model.vera_A["default"], theirs.base_model.vera_B["default"]
    assert (a.shape, b.shape) == ((rank, 10), (10, rank))
    adapters = adapters_named(ours, "default")
    for adapter in adapters:
        assert torch.equal(adapter.get_parameter("down"), a[:, : adapter.site.in_])
        assert torch.equal(adapter.get_parameter("up"), b[: adapter.site.out])
    assert any(torch.equal(adapter.get_parameter("down"), a) for adapter in adapters), "the widest layer's is all of A"
    assert any(torch.equal(adapter.get_parameter("up"), b) for adapter in adapters)


@pytest.mark.parametrize("transposed", [False, True])
def test_outputs_gradients_and_merged_weights_equal_peft_s(transposed: bool) -> None:
    ours, theirs = ours_and_peft(4, 0, transposed)
    pairs = []
    for adapter in adapters_named(ours, "default"):
        layer = theirs.base_model.model.get_submodule(adapter.site.path)
        for mine, other in (("d", layer.vera_lambda_d["default"]), ("b", layer.vera_lambda_b["default"])):
            assert torch.equal(adapter.get_parameter(mine), other), "they start alike"
            nn.init.normal_(adapter.get_parameter(mine))
            other.data.copy_(adapter.get_parameter(mine))
            pairs.append((adapter.get_parameter(mine), other))
    x = torch.randn(3, 6)
    y, z = ours(x), theirs(x)
    assert_close(y, z)
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    (z * direction).sum().backward()
    for parameter, other in pairs:
        assert_close(parameter.grad, other.grad)
    merge(ours)
    merged = theirs.merge_and_unload()
    for mine, other in zip(ours.layers, merged.layers, strict=True):
        assert_close(mine.weight, other.weight)
