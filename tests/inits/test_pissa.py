"""PiSSA: the principal part, by hand, by its spectrum, and what is left of the weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakit.core.adapters import Adapter
from lorakit.core.init import Init
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.inits.pissa import Pissa
from lorakit.inject.attach import adapters_named, attach
from lorakit.methods.lora import LoRA
from tests.inits.samples import started
from tests.law.cases import weight_of
from tests.methods.test_lora import adapted
from tests.tolerances import assert_close


def start_of(weight: Tensor, rank: int, alpha: float, init: Init, stabilised: bool = False) -> tuple[Tensor, Tensor]:
    """Return `(A0, B0)` on a given weight."""
    model = adapted(LoRA(1), torch.zeros(1, weight.shape[1]), torch.zeros(weight.shape[0], 1), weight)
    attach(model, AdapterSpec(LoRA(rank, alpha, stabilised, init), Targets("layer")), "other")
    t = adapters_named(model, "other")[0].tensors()
    return t["down"].detach(), t["up"].detach()


def product(adapter: Adapter) -> Tensor:
    """Return `s B0 A0` in the shape of the weight, group by group."""
    down, up = adapter.get_parameter("down").detach(), adapter.get_parameter("up").detach()
    groups = adapter.site.groups
    blocks = up.reshape(groups, -1, up.shape[1]) @ down.reshape(groups, up.shape[1], -1)
    return 2.0 * blocks.reshape(adapter.site.shape)


def test_one_case_by_hand() -> None:
    # W = diag(4, 1), s = 4 / 1: B0 = A0 = sqrt(4 / 4) e1, so s B0 A0 = diag(4, 0); both signs are right together
    down, up = start_of(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), 1, 4.0, Pissa())
    assert_close(down.abs(), torch.tensor([[1.0, 0.0]]))
    assert_close(up @ down, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize("init", [Pissa(), Pissa(16)])
@pytest.mark.parametrize("stabilised", [False, True])
def test_the_largest_singular_value_left_is_the_next_one(init: Init, stabilised: bool) -> None:
    weight = torch.randn(20, 30)
    down, up = start_of(weight, 4, 6.0, init, stabilised)
    spectrum = torch.linalg.svdvals(weight)
    rest = torch.linalg.svdvals(weight - (3.0 if stabilised else 1.5) * up @ down)  # 6 / sqrt(4), 6 / 4
    assert_close(rest[0], spectrum[4], scale=float(spectrum[0]))
    assert_close(rest[:16], spectrum[4:], scale=float(spectrum[0]))


def test_the_factors_share_the_spectrum_evenly() -> None:
    down, up = start_of(torch.randn(20, 30), 4, 6.0, Pissa())
    assert_close(down.norm(dim=1), up.norm(dim=0))


@pytest.mark.parametrize(("kind", "groups"), [("conv2d, grouped, reflected", 2), ("conv3d", 4), ("conv2d", 1)])
def test_each_group_of_a_convolution_has_its_own_principal_part(kind: str, groups: int) -> None:
    model, adapter, _, _ = started(kind, "pissa")
    weight = weight_of(model)
    for own, rest in zip(weight.chunk(groups), (weight - product(adapter)).chunk(groups), strict=True):
        spectrum, left = (torch.linalg.svdvals(t.flatten(1)) for t in (own, rest))
        assert_close(left[0], spectrum[4 // groups], scale=float(spectrum[0]))
