"""The table of a mixture's routers: who got the tokens, and how sure the routers were."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lorakit.core.spec import AdapterSpec, Targets
from lorakit.errors import AliveError
from lorakit.inject.activate import use
from lorakit.inject.attach import adapters_named, attach
from lorakit.inject.routing import routing
from lorakit.methods.lora import LoRA
from lorakit.methods.mixture import Mixture


def model_of(method: Mixture) -> nn.Sequential:
    """Return two layers 4 -> 4 with a mixture `m` whose routers read one input each, and a LoRA beside it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    attach(model, AdapterSpec(method, Targets(("0", "1"))), "m")
    attach(model, AdapterSpec(LoRA(2), Targets("0")), "plain")
    for adapter in adapters_named(model, "m"):
        with torch.no_grad():
            adapter.get_parameter("router").copy_(100.0 * torch.eye(method.experts, 4))
    return model


def test_the_table_has_a_row_for_each_site_with_experts() -> None:
    model = model_of(Mixture(experts=4, rank=1, top=2))
    two, other = torch.eye(4)[0] + torch.eye(4)[1], torch.eye(4)[0] + torch.eye(4)[2]
    model[0](torch.stack([two, two, two, other]))  # all four choose expert 0, three expert 1 and one expert 2
    model[1](torch.zeros(5, 4))
    first, second = routing(model)
    assert (first.adapter, first.site, first.share) == ("m", "0", (0.5, 0.375, 0.125, 0.0))
    assert first.entropy == pytest.approx(math.log(2), abs=1e-6)
    assert second.site == "1"
    assert sum(second.share) == 1.0
    assert second.entropy == pytest.approx(math.log(4))


def test_where_all_experts_act_the_share_is_of_their_weight() -> None:
    model = model_of(Mixture(experts=2, rank=1))
    model(torch.tensor([[math.log(3.0) / 100.0, 0.0, 0.0, 0.0]]))
    assert routing(model)[0].share == pytest.approx((0.75, 0.25))
    assert routing(model)[0].entropy == pytest.approx(0.562335, abs=1e-6)


def test_the_table_is_of_the_last_forward_the_mixture_took_part_in() -> None:
    model = model_of(Mixture(experts=2, rank=1))
    model(torch.eye(4)[[0]])
    before = routing(model)
    with use(model, {"plain": 1.0}):
        model(torch.eye(4)[[1]])
    assert routing(model) == before
    model(torch.eye(4)[[1]])
    assert routing(model)[0].share == pytest.approx((0.0, 1.0))


def test_a_slice_has_its_own_row() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    attach(model, AdapterSpec(Mixture(experts=2, rank=1), Targets(("0[0:3]", "0[3:6]"))))
    model(torch.randn(2, 4))
    assert [row.site for row in routing(model)] == ["0[0:3]", "0[3:6]"]


def test_without_a_mixture_or_a_forward_there_is_no_table() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    attach(model, AdapterSpec(LoRA(2), Targets("0")))
    model(torch.randn(2, 4))
    complaint = "no token was routed on this model; attach a mixture and run a forward first"
    with pytest.raises(AliveError, match=complaint):
        routing(model)
    with pytest.raises(AliveError, match=complaint):
        routing(model_of(Mixture(experts=2, rank=1)))
