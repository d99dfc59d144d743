"""LoKr: which factors are whole, what starts at 0, the scale, and the counts worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorakit.core.adapters import Adapter
from lorakit.core.site import Role, Site
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.errors import SpecError
from lorakit.inject.attach import adapters_named, attach
from lorakit.methods.lokr import LoKr
from tests.law.cases import Net


def adapter_of(method: LoKr, layer: nn.Module) -> Adapter:
    """Return the adapter of a layer."""
    model = Net(layer)
    attach(model, AdapterSpec(method, Targets("layer")))
    return adapters_named(model, "default")[0]


def shapes(method: LoKr, site: Site) -> dict[str, tuple[int, ...]]:
    """Return the declared shapes."""
    return {name: decl.shape for name, decl in method.tensors(site).items()}


def test_one_case_by_hand() -> None:
    # 4 = 2 * 2 both ways, r = 1 is not below 2 / 2, so both factors are whole and s = 1:
    # W1 = [[0, 1], [2, 0]], W2 = [[1, 2], [3, 4]]: dW = [[0, W2], [2 W2, 0]]
    adapter = adapter_of(LoKr(rank=1, alpha=8.0), nn.Linear(4, 4))
    with torch.no_grad():
        adapter.get_parameter("w1").copy_(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
        adapter.get_parameter("w2").copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    wanted = [[0, 0, 1, 2], [0, 0, 3, 4], [2, 4, 0, 0], [6, 8, 0, 0]]
    assert adapter.delta(torch.zeros(4, 4)).tolist() == wanted


def test_the_scale_is_alpha_over_r_where_a_factor_has_rank_r() -> None:
    # factor 1: W1 (1, 1), W2 (8, 8) = W2a W2b of rank 2: s = 6 / 2 = 3; sqrt(2) would give 4.24
    adapter = adapter_of(LoKr(rank=2, alpha=6.0, factor=1), nn.Linear(8, 8))
    with torch.no_grad():
        for values in adapter.parameters():
            values.fill_(1.0)
    assert torch.equal(adapter.delta(torch.zeros(8, 8)), torch.full((8, 8), 3.0 * 2))


def test_768_counts() -> None:
    square = Site("layer", 768, 768)
    # 768 = 24 * 32: W1 24^2 = 576, W2 (32, 32) of rank 8: 2 * 32 * 8 = 512
    assert shapes(LoKr(rank=8), square) == {"w1": (24, 24), "w2_a": (32, 8), "w2_b": (8, 32)}
    assert sum(d.numel for d in LoKr(rank=8).tensors(square).values()) == 1_088
    # rank 16 is not below 32 / 2, so W2 is whole: 576 + 1,024
    assert shapes(LoKr(rank=16), square) == {"w1": (24, 24), "w2": (32, 32)}
    # both: rank 8 is below 24 / 2: 2 * 24 * 8 + 512
    both = LoKr(rank=8, decompose_both=True)
    assert shapes(both, square) == {"w1_a": (24, 8), "w1_b": (8, 24), "w2_a": (32, 8), "w2_b": (8, 32)}
    assert sum(d.numel for d in both.tensors(square).values()) == 896
    # factor 8: W1 8^2 = 64, W2 (96, 96) of rank 8: 2 * 96 * 8 = 1,536
    assert sum(d.numel for d in LoKr(rank=8, factor=8).tensors(square).values()) == 1_600


def test_a_kernel_belongs_to_w2() -> None:
    conv = Site("layer", 64, 32, (3, 3), kind="conv2d")
    assert shapes(LoKr(rank=2), conv) == {"w1": (8, 4), "w2_a": (8, 2), "w2_b": (2, 8 * 9)}
    assert shapes(LoKr(rank=4), conv) == {"w1": (8, 4), "w2": (8, 8, 3, 3)}


def test_an_update_of_few_numbers_has_full_rank() -> None:
    adapter = adapter_of(LoKr(rank=32), nn.Linear(768, 768))
    with torch.no_grad():
        adapter.get_parameter("w1").copy_(torch.linalg.qr(torch.randn(24, 24))[0])
        adapter.get_parameter("w2").copy_(torch.linalg.qr(torch.randn(32, 32))[0])
    singular = torch.linalg.svdvals(adapter.delta(torch.zeros(768, 768)))
    torch.testing.assert_close(singular, torch.ones(768))  # an orthogonal 768 x 768 matrix of 1,600 numbers


@pytest.mark.parametrize(
    ("zero", "whole", "paired"),
    [("w1", {"w1"}, {"w1_a"}), ("w2", {"w2"}, {"w2_b"})],
)
def test_one_factor_starts_at_zero(zero: Any, whole: set[str], paired: set[str]) -> None:
    for method, resting in (
        (LoKr(rank=4, zero=zero), whole),
        (LoKr(rank=1, factor=4, decompose_both=True, zero=zero), paired),
    ):
        adapter = adapter_of(method, nn.Linear(12, 8))
        assert {name for name, values in adapter.tensors().items() if not values.any()} == resting
        assert {name for name, decl in method.tensors(adapter.site).items() if decl.role is Role.UP} == resting


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, not 0; exclude a layer to skip it"),
        ({"alpha": -1.0}, "alpha must be a positive number, not -1.0; alpha = rank makes the scale 1"),
        ({"factor": -1}, "factor must be a whole number of at least 1, not -1"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        LoKr(**fields)


def test_a_start_that_does_not_exist_is_refused() -> None:
    method = LoKr()
    object.__setattr__(method, "zero", "w3")  # past the type checks that run with the tests
    with pytest.raises(SpecError, match=r"zero must be w1 \(as in PEFT\) or w2 \(as in LyCORIS\), not 'w3'"):
        method.__post_init__()
