"""Parity of LoHa with PEFT: same tensors, same outputs, gradients, starts and merged weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.core.spec import AdapterSpec, Targets
from lorakit.inject.attach import adapters_named, attach
from lorakit.inject.merge import merge
from lorakit.methods.loha import LoHa
from tests.law.cases import KINDS, Kind, Net, jitter
from tests.tolerances import assert_close

SHARED = {kind: KINDS[kind] for kind in ("linear", "linear, no bias", "conv1d", "conv2d")} | {
    "conv2d, 1 x 1": Kind(lambda: nn.Conv2d(12, 8, 1), lambda: torch.randn(3, 12, 5, 5)),
}
"""PEFT has no LoHa of an embedding, of GPT-2's Conv1D and of a three-dimensional convolution."""

GROUPED = Kind(lambda: nn.Conv2d(12, 8, 3, groups=2, padding=1), lambda: torch.randn(3, 12, 7, 7))
OURS = {"hada_w1_a": "up1", "hada_w1_b": "down1", "hada_w2_a": "up2", "hada_w2_b": "down2"}


def ours_and_peft(kind: Kind) -> tuple[Net, Any]:
    """Return two models of one layer with the same random factors, one adapted by lorakit, one by PEFT."""
    ours = Net(kind.layer())
    theirs = with_peft(ours, 4)
    attach(ours, AdapterSpec(LoHa(4, 8.0), Targets("layer")))
    jitter(adapters_named(ours, "default")[0])
    with torch.no_grad():
        for name, parameter in factors(theirs).items():
            parameter.copy_(adapters_named(ours, "default")[0].get_parameter(name).reshape(parameter.shape))
    return ours, theirs


def with_peft(model: Net, rank: int) -> Any:
    """Return a copy of the model with PEFT's LoHa of this rank, alpha 2 r."""
    from peft import LoHaConfig, get_peft_model

    return get_peft_model(copy.deepcopy(model), LoHaConfig(r=rank, alpha=2 * rank, target_modules=["layer"]))  # type: ignore[arg-type]


def factors(theirs: Any) -> dict[str, Tensor]:
    """Return PEFT's factors by our names."""
    return {OURS[n.split(".")[-2]]: parameter for n, parameter in theirs.named_parameters() if "hada_" in n}


@pytest.mark.parametrize("kind", SHARED)
def test_outputs_and_gradients_equal_peft_s(kind: str) -> None:
    ours, theirs = ours_and_peft(SHARED[kind])
    x = SHARED[kind].inputs()
    y, z = ours(x), theirs(x)
    assert_close(y, z)
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    (z * direction).sum().backward()
    for name, parameter in factors(theirs).items():
        grad = adapters_named(ours, "default")[0].get_parameter(name).grad
        assert grad is not None
        assert parameter.grad is not None
        assert_close(grad.reshape(parameter.shape), parameter.grad)


@pytest.mark.parametrize("kind", SHARED)
def test_merged_weights_equal_peft_s(kind: str) -> None:
    ours, theirs = ours_and_peft(SHARED[kind])
    merge(ours)
    assert_close(ours.layer.get_parameter("weight"), theirs.merge_and_unload().layer.weight)


def test_a_grouped_convolution_of_peft_s_is_ours_with_the_inputs_of_each_group_repeated() -> None:
    # PEFT's groups share A; ours have their own, so rank 4 in 2 groups holds what PEFT's rank 2 does (s = 2 for both)
    ours = Net(GROUPED.layer())
    theirs = with_peft(ours, 2)
    attach(ours, AdapterSpec(LoHa(4, 8.0), Targets("layer")))
    with torch.no_grad():
        for name, parameter in factors(theirs).items():
            parameter.normal_()
            own = adapters_named(ours, "default")[0].get_parameter(name)
            own.copy_((parameter if "up" in name else parameter.repeat(2, 1)).reshape(own.shape))
    x = GROUPED.inputs()
    assert_close(ours(x), theirs(x))


def test_it_starts_from_the_same_distributions() -> None:
    ours = Net(nn.Linear(512, 512))
    theirs = factors(with_peft(ours, 64))
    attach(ours, AdapterSpec(LoHa(64), Targets("layer")))
    own = adapters_named(ours, "default")[0]
    bounds = {"up1": 1 / 8, "up2": 1 / 8, "down1": 1 / 512**0.5, "down2": 0.0}  # U(-1/sqrt(fan in), 1/sqrt(fan in))
    for name, bound in bounds.items():
        for sample in (own.get_parameter(name), theirs[name]):
            assert 0.99 * bound <= sample.abs().max() <= bound * 1.0001
            assert abs(sample.std().item() - bound / 3**0.5) <= 0.02 * bound
