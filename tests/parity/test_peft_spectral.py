"""Parity of the analyses that PEFT has with PEFT: the rank at a share of energy, and intruder dimensions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorakit.core.factored import factored
from lorakit.spectral.intruder import intruders
from lorakit.spectral.rank import rank_at
from tests.law.cases import Net
from tests.tolerances import assert_close


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_the_rank_at_a_share_of_energy(share: float) -> None:
    from peft.tuners.lora.conversion import _find_cutoff_index

    for n in (1, 5, 64):
        sigma = torch.rand(n, dtype=torch.float64).sort(descending=True).values
        assert rank_at(sigma, share) == _find_cutoff_index(sigma, share)


@pytest.mark.parametrize("keep", [0.0, 0.75, 1.0])
def test_intruders_are_mitigated_alike(keep: float) -> None:
    """Their lambda is our keep; they cut the result back to the adapter's rank, so ours is cut here too."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    net = Net(nn.Linear(24, 32, bias=False))
    theirs: Any = get_peft_model(net, LoraConfig(r=3, lora_alpha=6, target_modules=["layer"]))
    layer = theirs.base_model.model.layer
    nn.init.normal_(layer.lora_A["default"].weight)
    nn.init.normal_(layer.lora_B["default"].weight)
    weight, delta = layer.base_layer.weight.detach(), layer.get_delta_weight("default").detach()
    said: list[str] = []
    reduce_intruder_dimension(theirs, mitigation_lambda=keep, logging_sink=said.append)
    found = intruders(weight, delta)
    assert found.count
    assert f"base_model.model.layer: Intruders: {found.count}" in said
    down, up = found.mitigation(keep)
    ours = delta + up @ down
    u, s, vh = factored(torch.eye(24), ours)
    cut = (u[:, :3] * s[:3]) @ vh[:3]
    assert_close(layer.get_delta_weight("intruder_reduced").detach(), cut, scale=float(delta.norm()))
