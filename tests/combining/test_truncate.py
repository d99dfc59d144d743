"""The LoRA nearest to any static update: torch's own SVD, exact where the rank suffices, refused without a dW."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lorakit.combining import truncate
from lorakit.core.approximation import Loss, total
from lorakit.core.method import LowRank
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.core.state import AdapterState, check_tensors
from lorakit.errors import CombineError, SpecError
from lorakit.inject.attach import adapters_named, attach, state
from lorakit.methods.dora import DoRA
from lorakit.methods.ia3 import IA3
from lorakit.methods.lora import LoRA
from lorakit.methods.mixture import Mixture
from tests.law.cases import KINDS, STATIC, Net, net, weight_of
from tests.tolerances import assert_close

GROUPS = {"conv2d, grouped, reflected": 2, "conv3d": 4}


def given(kind: str, name: str) -> tuple[Net, AdapterState, torch.Tensor]:
    """Return a model with one jittered method, its state, and its dW."""
    model = net(kind, name)
    return model, state(model, "n0"), adapters_named(model, "n0")[0].delta(weight_of(model))


@pytest.mark.parametrize(("kind", "name"), STATIC)
def test_a_rank_as_high_as_the_weight_s_is_exact(kind: str, name: str) -> None:
    model, before, delta = given(kind, name)
    made = truncate(before, 12 * GROUPS.get(kind, 1) * 3, base={"layer": weight_of(model)})
    near, losses = made.state, made.losses
    check_tensors(near.updates)
    (update,) = near.updates
    assert isinstance(update.method, LoRA)
    update.method.check(update.site)
    assert_close(update.method.delta(update.tensors, delta), delta)
    assert losses["layer"].relative < 2e-5


@pytest.mark.parametrize("kind", ["linear", "transposed-linear", "embedding", "conv2d"])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_error_is_that_of_the_singular_values_left_out(kind: str, rank: int) -> None:
    model, before, delta = given(kind, "ia3")
    made = truncate(before, rank, base={"layer": weight_of(model)})
    near, losses = made.state, made.losses
    values = torch.linalg.svdvals(delta.flatten(1))
    assert losses["layer"].error == pytest.approx(values[rank:].norm().item(), rel=1e-4)
    assert losses["layer"].size == pytest.approx(values.norm().item(), rel=1e-4)
    method = near.updates[0].method
    assert isinstance(method, LowRank)
    assert near.spec.method == method
    left = delta - method.delta(near.updates[0].tensors, delta)
    assert left.norm().item() == pytest.approx(losses["layer"].error, rel=1e-4)


def test_by_hand() -> None:
    # dW = diag(l - 1) W with l = (4, 5), W = I: singular values 4 and 3; rank 1 leaves 3 of 5
    model = Net(torch.nn.Linear(2, 2, bias=False))
    torch.nn.init.eye_(model.layer.weight)  # type: ignore[arg-type]
    attach(model, AdapterSpec(IA3(), Targets("layer")))
    with torch.no_grad():
        adapters_named(model, "default")[0].get_parameter("gain").copy_(torch.tensor([4.0, 5.0]))
    losses = truncate(state(model), 1, base={"layer": model.layer.weight.detach()}).losses  # type: ignore[union-attr]
    assert losses["layer"].relative == pytest.approx(3 / 5)
    assert total({"a": Loss(3.0, 5.0), "b": Loss(4.0, 12.0)}) == pytest.approx(5 / 13)
    assert Loss(0.0, 0.0).relative == 0
    assert Loss(1.0, 0.0).relative == math.inf


@pytest.mark.parametrize("method", [DoRA(LoRA(2)), IA3()])
def test_a_change_that_depends_on_the_weight_asks_for_it(method: DoRA | IA3) -> None:
    model = Net(KINDS["linear"].layer())
    attach(model, AdapterSpec(method, Targets("layer")))
    with pytest.raises(CombineError, match=f"layer: {method.name}'s change of this weight depends on the weight"):
        truncate(state(model), 2)


def test_what_is_no_change_of_a_weight_is_refused_by_its_type() -> None:
    model = Net(KINDS["linear"].layer())
    attach(model, AdapterSpec(Mixture(2, 2), Targets("layer")))
    with pytest.raises(CombineError, match="are no change of a weight:\n  - layer: mixture"):
        truncate(state(model), 2)


def test_a_rank_that_cannot_be_is_refused() -> None:
    _, before, _ = given("conv2d, grouped, reflected", "lora")
    with pytest.raises(CombineError, match="layer: rank 3 is not a multiple of its 2 groups"):
        truncate(before, 3)
    with pytest.raises(SpecError, match="rank must be a whole number of at least 1, not 0"):
        truncate(before, 0)
    unknown = replace(before.updates[0], site=replace(before.updates[0].site, in_=0))
    with pytest.raises(CombineError, match="does not tell how wide these layers are; name the base:\n  - layer"):
        truncate(replace(before, updates=(unknown,)), 2)
