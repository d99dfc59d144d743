"""KronA: one case and a count worked out by hand, what starts at 0, and the shapes it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakit.core.spec import AdapterSpec, Targets
from lorakit.errors import SpecError
from lorakit.inject.attach import adapters_named, attach
from lorakit.methods.krona import KronA
from tests.law.cases import Net


def test_one_case_by_hand() -> None:
    # A = [[1, 2]] (1, 2), B = [[3, 0], [0, 4]] (2, 2), s = 0.5: dW = [[1.5, 0, 3, 0], [0, 2, 0, 4]]
    model = Net(nn.Linear(4, 2, bias=False))
    attach(model, AdapterSpec(KronA(a1=1, a2=2, scale=0.5), Targets("layer")))
    adapter = adapters_named(model, "default")[0]
    with torch.no_grad():
        model.layer.get_parameter("weight").zero_()
        adapter.get_parameter("a").copy_(torch.tensor([[1.0, 2.0]]))
        adapter.get_parameter("b").copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    assert adapter.delta(torch.zeros(2, 4)).tolist() == [[1.5, 0.0, 3.0, 0.0], [0.0, 2.0, 0.0, 4.0]]
    # x = (1, 10, 100, 1000): row 0 gives 1.5 + 300, row 1 gives 20 + 4000
    assert model(torch.tensor([1.0, 10.0, 100.0, 1000.0])).tolist() == [301.5, 4020.0]


def test_768_counts_and_what_starts_at_zero() -> None:
    model = Net(nn.Linear(768, 768))
    handle = attach(model, AdapterSpec(KronA(a1=32, a2=24), Targets("layer")))
    assert sum(p.numel() for p in handle.parameters()) == 32 * 24 + 24 * 32 == 1_536
    adapter = adapters_named(model, "default")[0]
    a = adapter.get_parameter("a")
    assert 0.2 < a.abs().max() <= 24**-0.5
    assert not adapter.get_parameter("b").any()


def test_a_shape_that_does_not_divide_is_refused_with_one_that_does() -> None:
    with pytest.raises(SpecError, match="layer: a1 = 5 does not divide the layer's 8 outputs; use a1 = 4"):
        attach(Net(nn.Linear(12, 8)), AdapterSpec(KronA(a1=5, a2=3), Targets("layer")))
    with pytest.raises(SpecError, match="layer: a2 = 32 does not divide the layer's 12 inputs; use a2 = 12"):
        attach(Net(nn.Linear(12, 8)), AdapterSpec(KronA(a1=8), Targets("layer")))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"a1": 0}, "a1 must be a whole number of at least 1, not 0"),
        ({"a2": -3}, "a2 must be a whole number of at least 1, not -3"),
        ({"scale": 0.0}, "scale must be a positive number, not 0.0; 1 is the usual start of a search"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields: dict[str, float], complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        KronA(**fields)  # type: ignore[arg-type]
