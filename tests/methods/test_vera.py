"""VeRA: the paper's counts, one case by hand, and banks that layers share."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import RobertaConfig, RobertaModel

from lorakit.core.spec import AdapterSpec, Override, Targets
from lorakit.errors import SpecError
from lorakit.inject.attach import adapters_named, attach, state
from lorakit.methods.vera import VeRA
from tests.law.cases import Net, jitter
from tests.tolerances import assert_close


def mixed() -> nn.Sequential:
    """Return layers of three shapes: the widest input is 10, the tallest output 8."""
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 10), nn.Linear(10, 5), nn.Linear(5, 6))


def test_one_case_by_hand() -> None:
    # A = [[1, 2], [0, 1]], B = [[1, 1], [2, 0]], d = (2, 3), b = (1, 10):
    # diag(d) A = [[2, 4], [0, 3]]; B of it = [[2, 7], [4, 8]]; diag(b) of it = [[2, 7], [40, 80]]
    model = Net(nn.Linear(2, 2, bias=False))
    attach(model, AdapterSpec(VeRA(2), Targets("layer")))
    adapter = adapters_named(model, "default")[0]
    with torch.no_grad():
        adapter.get_parameter("down").copy_(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        adapter.get_parameter("up").copy_(torch.tensor([[1.0, 1.0], [2.0, 0.0]]))
        adapter.get_parameter("d").copy_(torch.tensor([2.0, 3.0]))
        adapter.get_parameter("b").copy_(torch.tensor([1.0, 10.0]))
    assert adapter.delta(torch.zeros(2, 2)).tolist() == [[2.0, 7.0], [40.0, 80.0]]
    model.layer.weight.data.zero_()
    assert model(torch.tensor([1.0, -1.0])).tolist() == [-5.0, -40.0]


@pytest.mark.parametrize(
    ("config", "rank", "parameters"),
    [
        (RobertaConfig(), 1024, 43_008),  # 24 (768 + 1024)
        (RobertaConfig(num_hidden_layers=24, hidden_size=1024, num_attention_heads=16), 256, 61_440),  # 48 (1024 + 256)
    ],
)
def test_the_paper_s_counts_on_roberta(config: RobertaConfig, rank: int, parameters: int) -> None:
    with torch.device("meta"):
        model = RobertaModel(config)
    handle = attach(model, AdapterSpec(VeRA(rank), Targets(["query", "value"])))
    assert sum(p.numel() for p in handle.parameters()) == parameters


def test_layers_share_slices_of_one_pair_of_banks() -> None:
    model = mixed()
    attach(model, AdapterSpec(VeRA(4), Targets()))
    adapters = adapters_named(model, "default")
    rng = torch.Generator().manual_seed(0)
    a = (torch.rand(4, 10, generator=rng) * 2 - 1) * math.sqrt(6 / 10)
    b = (torch.rand(10, 4, generator=rng) * 2 - 1) * math.sqrt(6 / 4)
    for adapter in adapters:
        assert_close(adapter.get_parameter("down"), a[:, : adapter.site.in_])
        assert_close(adapter.get_parameter("up"), b[: adapter.site.out])
        assert adapter.get_parameter("d").tolist() == [pytest.approx(0.1)] * 4
        assert not adapter.get_parameter("b").any()
    assert adapters[2].get_parameter("down") is adapters[4].get_parameter("down"), "one tensor for one width"
    assert adapters[1].get_parameter("up") is adapters[3].get_parameter("up"), "and for one height"


def test_the_banks_rest_while_b_and_d_learn() -> None:
    model = mixed()
    handle = attach(model, AdapterSpec(VeRA(4), Targets()))
    frozen = {id(t): t.clone() for u in adapters_named(model, "default") for t in (u.get_parameter("down"),)}
    optimizer = torch.optim.SGD(handle.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(7, 6)).square().sum().backward()
        optimizer.step()
    for adapter in adapters_named(model, "default"):
        assert torch.equal(adapter.get_parameter("down"), frozen[id(adapter.get_parameter("down"))])
        assert adapter.get_parameter("b").all()
        assert (adapter.get_parameter("d") != 0.1).all()


def test_a_key_draws_the_same_banks_whatever_the_seed_and_the_base_s_dtype() -> None:
    def bank(key: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        model = mixed().to(dtype)
        attach(model, AdapterSpec(VeRA(4, key=key), Targets(), seed=seed))
        return adapters_named(model, "default")[3].get_parameter("up").detach()

    assert torch.equal(bank(0, seed=1), bank(0, seed=2))
    assert torch.equal(bank(0, seed=1).double(), bank(0, seed=1, dtype=torch.float64))
    assert not torch.equal(bank(0, seed=1), bank(1, seed=1))


def test_an_override_of_the_rank_has_banks_of_its_own() -> None:
    model, x = mixed(), torch.randn(3, 6)
    attach(model, AdapterSpec(VeRA(4), Targets(), overrides=(Override.of("2", rank=7),)))
    for adapter in adapters_named(model, "default"):
        jitter(adapter)
    twin = mixed()
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})
    attach(twin, state(model))
    assert torch.equal(twin(x), model(x))
    assert [a.get_parameter("down").shape[0] for a in adapters_named(model, "default")] == [4, 4, 7, 4, 4]


def test_a_rank_above_the_weight_s_is_taken() -> None:
    model = Net(nn.Linear(3, 4))
    attach(model, AdapterSpec(VeRA(64), Targets("layer")))
    assert adapters_named(model, "default")[0].get_parameter("down").shape == (64, 3)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, not 0; VeRA takes 256 to 1024"),
        ({"d_initial": 0.0}, "d_initial must be a number other than 0, not 0.0; at 0 b learns nothing"),
        ({"d_initial": math.nan}, "d_initial must be a number other than 0, not nan"),
        ({"key": -1}, "key must be a whole number of at least 0, not -1; it seeds the banks"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields: dict[str, int], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        VeRA(**fields)
