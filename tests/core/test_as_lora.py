"""Every low-rank adapter written out as plain LoRA: the same outputs, a spec that says so, and no guess elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.core.as_lora import as_lora
from lorakit.core.method import Dense, LowRank
from lorakit.core.site import Decl, Role, Site
from lorakit.core.spec import AdapterSpec, Override, Targets
from lorakit.core.state import AdapterState, Purpose, Update, check_tensors
from lorakit.core.targets import resolve
from lorakit.errors import SpecError
from lorakit.inject.attach import adapters_named, attach, state
from lorakit.inject.sites import sites
from lorakit.methods.block import BlockDiagonal
from lorakit.methods.hierarchical import Hierarchical
from lorakit.methods.lora import LoRA
from lorakit.methods.lora_fa import LoRAFA
from lorakit.methods.per_head import PerHead
from lorakit.methods.vera import VeRA
from tests.law.cases import KINDS, METHODS, STATIC, Net, inputs, jitter, net
from tests.tolerances import assert_close

LOW_RANK = [(kind, name) for kind, name in STATIC if isinstance(METHODS[name], LowRank)]


@pytest.mark.parametrize(("kind", "method"), LOW_RANK)
def test_the_plain_lora_gives_the_same_outputs(kind: str, method: str) -> None:
    model, x = net(kind, method), inputs(kind)
    plain = as_lora(state(model, "n0"))
    check_tensors(plain.updates)
    assert [type(u.method) for u in plain.updates] == [LoRA]
    assert plain.updates[0].method.scale == 1.0  # type: ignore[attr-defined]
    plain.updates[0].method.check(plain.updates[0].site)
    twin = Net(KINDS[kind].layer())
    twin.layer.load_state_dict({k: v for k, v in model.layer.state_dict().items() if "adapters" not in k})
    attach(twin, plain)
    assert_close(twin(x), model(x))


class Several(nn.Module):
    """Layers of three shapes, one of them transposed and fused."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fused, self.last = nn.Linear(6, 8), Conv1D(24, 8), nn.Linear(24, 8)
        self.norm = nn.ModuleDict({"first": nn.LayerNorm(8)})  # its path ends as a layer's does

    def forward(self, x: Tensor) -> Tensor:
        """Return the last layer's output."""
        y: Tensor = self.norm["first"](self.last(self.fused(self.first(x))))
        return y


WHERE = Targets(["re:first", "fused[0:8]", "fused[16:24]", "last"])


@pytest.mark.parametrize(
    "method",
    [VeRA(6), BlockDiagonal(4, 8.0), PerHead(2, 4.0, 4), Hierarchical(2, 4.0, 1, 1), LoRAFA(4, 8.0), LoRA(4, 8.0)],
)
def test_a_whole_adapter_stays_what_it_is(method: LowRank) -> None:
    model, x = Several(), torch.randn(3, 6)
    overrides = (Override.of("fused[16:24]", rank=method.rank // 2),)
    attach(model, AdapterSpec(method, WHERE, train=("norm.first",), overrides=overrides, seed=3))
    for adapter in adapters_named(model, "default"):
        jitter(adapter)
    given = replace(state(model), purpose=Purpose("classification"))
    plain = as_lora(given)
    assert (plain.base, plain.purpose, plain.trained.keys()) == (given.base, given.purpose, given.trained.keys())
    assert [u.site for u in plain.updates] == [u.site for u in given.updates]
    twin = Several()
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})
    attach(twin, plain)
    assert_close(twin(x), model(x))


def test_the_spec_says_which_layer_has_which_rank() -> None:
    model = Several()
    overrides = (Override.of("fused[16:24]", rank=1), Override.of("re:first", rank=3))
    attach(model, AdapterSpec(Hierarchical(2, 4.0, 1, 1), WHERE, overrides=overrides))
    plain = as_lora(state(model))
    assert plain.spec.method == LoRA(4, 4.0)
    assert plain.spec == AdapterSpec.from_json(plain.spec.to_json())
    found = {match.site.key: match.method for match in resolve(plain.spec, sites(Several()))}
    assert found == {u.site.key: u.method for u in plain.updates}
    assert {key: m.rank for key, m in found.items()} == {  # type: ignore[attr-defined]
        "first": 5, "fused[0:8]": 4, "fused[16:24]": 3, "last": 4,
    }  # fmt: skip


def test_a_product_of_more_ranks_than_the_weight_has_is_multiplied_out() -> None:
    model = nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 3))
    attach(model, AdapterSpec(VeRA(64), Targets()))
    for adapter in adapters_named(model, "default"):
        jitter(adapter)
    given, plain = state(model), as_lora(state(model))
    assert [u.method.rank for u in plain.updates] == [3, 3]  # type: ignore[attr-defined]
    for theirs, ours in zip(given.updates, plain.updates, strict=True):
        zero = torch.zeros(theirs.site.shape)
        assert_close(ours.method.delta(ours.tensors, zero), theirs.method.delta(theirs.tensors, zero))  # type: ignore[attr-defined]
    resolve(plain.spec, sites(model))  # LoRA takes every rank it names


def test_16_bit_factors_are_multiplied_in_fp32() -> None:
    site = Site("layer", 8, 12)
    tensors = {name: torch.randn(d.shape).bfloat16() for name, d in LoRA(4, 7.0).tensors(site).items()}
    plain = as_lora(AdapterState(AdapterSpec(LoRA(4, 7.0)), (Update(site, LoRA(4, 7.0), tensors),)))
    ours = plain.updates[0].tensors
    assert torch.equal(ours["up"], 1.75 * tensors["up"].float())


class Whole(Dense):
    """A dW of its own at every weight."""

    name, paper, formula, count = "whole", "none", "dW", "m * n"

    def tensors(self, site: Site) -> dict[str, Decl]:
        """Declare dW."""
        return {"all": Decl(site.shape, Role.GAIN)}

    def init(self, p: dict[str, Tensor], start: object) -> None:
        """Start at 0."""
        p["all"].zero_()

    def delta(self, p: dict[str, Tensor], weight: Tensor) -> Tensor:
        """Return dW."""
        return p["all"]


def test_what_is_no_low_rank_product_is_refused_by_name() -> None:
    sites_ = [Site("a", 2, 2), Site("b", 2, 2)]
    updates = tuple(Update(s, m, {}) for s, m in zip(sites_, (Whole(), LoRA(1)), strict=True))
    with pytest.raises(
        SpecError, match=r"1 update\(s\) are no low-rank product, so no LoRA equals them[^b]*- a: whole$"
    ):
        as_lora(AdapterState(AdapterSpec(LoRA(1)), updates))


def test_an_adapter_without_updates_is_returned_as_it_is() -> None:
    given = AdapterState(AdapterSpec(None, train=("biases",)), ())
    assert as_lora(given) is given
