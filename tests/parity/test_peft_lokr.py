"""Parity with PEFT's LoKr: same factors, same outputs, gradients and merged weights; and the two ways we part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.lokr.layer import factorization as peft_factorization
from torch import nn

from lorakit.core.adapters import Adapter
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.inject.attach import adapters_named, attach
from lorakit.inject.merge import merge
from lorakit.methods.kronecker import factorization
from lorakit.methods.lokr import LoKr
from tests.law.cases import Net, jitter
from tests.tolerances import assert_close

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(48, 32), (2, 5, 48)),
    "conv1d": (lambda: nn.Conv1d(48, 32, 3, padding=1), (2, 48, 9)),
    "conv2d": (lambda: nn.Conv2d(48, 32, 3, stride=2, padding=1), (2, 48, 9, 9)),
    "conv2d, 1 x 1": (lambda: nn.Conv2d(48, 32, 1), (2, 48, 5, 5)),
}
CONFIGS = {
    "root": LoKr(rank=2, alpha=6.0),
    "factor 4": LoKr(rank=3, alpha=6.0, factor=4),
    "both factored": LoKr(rank=1, alpha=2.0, decompose_both=True),
    "whole, s = 1": LoKr(rank=16, alpha=16.0),
}


def ours_and_peft(layer: Callable[[], nn.Module], method: LoKr, start: bool | str = False) -> tuple[Net, Any]:
    """Return two models of one layer with the same random factors, one adapted by lorakit, one by PEFT."""
    from peft import LoKrConfig, get_peft_model

    ours = Net(layer())
    theirs: Any = Net(layer())
    theirs.load_state_dict(ours.state_dict())
    config = LoKrConfig(
        r=method.rank,
        alpha=int(method.alpha),
        decompose_factor=-1 if method.factor is None else method.factor,
        decompose_both=method.decompose_both,
        init_weights=start,
        target_modules=["layer"],
    )
    theirs = get_peft_model(theirs, config)
    attach(ours, AdapterSpec(method, Targets("layer")))
    if start is False:
        adapter = adapters_named(ours, "default")[0]
        jitter(adapter)
        with torch.no_grad():
            for name, values in adapter.named_parameters():
                theirs_of(theirs, name).copy_(values)
    return ours, theirs


def theirs_of(theirs: Any, name: str) -> nn.Parameter:
    """Return PEFT's factor of our name."""
    parameter: nn.Parameter = getattr(theirs.base_model.model.layer, f"lokr_{name}")["default"]
    return parameter


def adapter_of(ours: Net) -> Adapter:
    """Return the one adapter."""
    return adapters_named(ours, "default")[0]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("layer", LAYERS)
def test_outputs_gradients_and_merged_weights_equal_peft_s(layer: str, config: str) -> None:
    if (layer, config) == ("conv1d", "whole, s = 1"):
        pytest.skip("the last test: PEFT's is no Kronecker product of the channels")
    make, shape = LAYERS[layer]
    ours, theirs = ours_and_peft(make, CONFIGS[config])
    x = torch.randn(shape)
    y, z = ours(x), theirs(x)
    assert_close(y, z)
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    (z * direction).sum().backward()
    for name, values in adapter_of(ours).named_parameters():
        assert_close(values.grad, theirs_of(theirs, name).grad)
    merge(ours)
    assert_close(ours.layer.get_parameter("weight"), theirs.merge_and_unload().layer.weight)


def test_every_width_is_cut_as_peft_cuts_it() -> None:
    for width in range(1, 300):
        for factor in (None, 1, 2, 3, 4, 7, 8, 16, 50, 1000):
            assert factorization(width, factor) == peft_factorization(width, -1 if factor is None else factor)


@pytest.mark.parametrize(("zero", "start"), [("w1", True), ("w2", "lycoris")])
@pytest.mark.parametrize("method", [LoKr(rank=2, factor=8), LoKr(rank=64), LoKr(rank=4, decompose_both=True)])
def test_the_start_has_peft_s_distribution(method: LoKr, zero: Any, start: bool | str) -> None:
    chosen = LoKr(method.rank, method.alpha, method.factor, method.decompose_both, zero)
    ours, theirs = ours_and_peft(lambda: nn.Linear(768, 1536), chosen, start)
    for name, values in adapter_of(ours).named_parameters():
        other = theirs_of(theirs, name)
        assert values.shape == other.shape
        assert bool(values.any()) == bool(other.any())
        bound = values.shape[1] ** -0.5 if values.any() else 0.0
        for sample in (values, other):
            assert bound * 0.8 <= sample.abs().max() <= bound


def test_where_both_factors_are_whole_peft_still_scales_by_a_rank_nothing_has() -> None:
    # LyCORIS sets s = 1 there, and so do we; PEFT's alpha / r is 32 / 16 = 2. Where this fails, PEFT has mended it
    ours, theirs = ours_and_peft(LAYERS["linear"][0], LoKr(rank=16, alpha=32.0))
    delta = adapter_of(ours).delta(torch.zeros(32, 48))
    assert_close(2.0 * delta, theirs.base_model.model.layer.get_delta_weight("default"))


def test_peft_s_conv1d_with_a_whole_w2_still_mixes_channels_and_positions() -> None:
    ours, theirs = ours_and_peft(LAYERS["conv1d"][0], CONFIGS["whole, s = 1"])
    mine = adapter_of(ours).delta(torch.zeros(32, 48, 3))
    other = theirs.base_model.model.layer.get_delta_weight("default")
    w1, w2 = theirs_of(theirs, "w1"), theirs_of(theirs, "w2")
    per_position = torch.stack([torch.kron(w1, w2[..., k]) for k in range(3)], dim=-1)
    assert_close(mine, per_position)
    assert not torch.allclose(other, per_position, atol=1e-2)
