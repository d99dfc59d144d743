"""What the combined adapter says of itself: a spec that means its layers, files that PEFT reads, what all agree on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.combining import Ties, average_factors, combine, truncate
from lorakit.core.spec import AdapterSpec, Override, Targets
from lorakit.core.state import AdapterState, Purpose
from lorakit.core.targets import resolve
from lorakit.inject.attach import adapters_named, attach, state
from lorakit.inject.sites import sites
from lorakit.methods.adalora import AdaLoRA
from lorakit.methods.lora import LoRA
from lorakit.persist import load, save
from tests.combining.samples import Q, V, adapter, deltas
from tests.law.cases import jitter
from tests.tolerances import assert_close


class Blocks(nn.Module):
    """Two blocks of two layers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}) for _ in range(2))
        self.score = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the head's output."""
        for block in self.h:
            x = x + block["down"](block["up"](x))  # type: ignore[index]
        y: Tensor = self.score(x)
        return y


def trained(spec: AdapterSpec, seed: int) -> AdapterState:
    """Return the state of an adapter of the same base, moved off its start."""
    torch.manual_seed(0)
    model = Blocks()
    torch.manual_seed(seed)
    attach(model, spec)
    for each in adapters_named(model, "default"):
        jitter(each)
    return state(model)


ONE = trained(
    AdapterSpec(LoRA(2, 3.0), Targets("up"), ("score",), 0.1, (Override.of("up", layers="1", rank=4),), seed=5), 1
)
TWO = trained(AdapterSpec(LoRA(3, 4.0, stabilised=True), Targets(("up", "down"), layers="1")), 2)


@pytest.mark.parametrize("how", ["linear", "concat", "svd", Ties(0.5)])
def test_the_spec_means_its_layers_at_their_ranks(how: Any) -> None:
    together = combine([ONE, TWO], how, [1.0, 0.5]).state
    assert [u.site.key for u in together.updates] == ["h.0.up", "h.1.up", "h.1.down"]
    assert together.spec == AdapterSpec.from_json(together.spec.to_json())
    found = {match.site.key: match.method for match in resolve(together.spec, sites(Blocks()))}
    assert found == {u.site.key: u.method for u in together.updates}
    assert all(isinstance(m, LoRA) and m.scale == 1.0 for m in found.values())
    assert together.spec.train == ("score",)
    assert (together.spec.dropout, together.spec.seed) == (0.0, 0)


def test_what_all_adapters_agree_on_stays() -> None:
    purpose = Purpose("causal-lm", "chat")
    one, two = (replace(s, purpose=purpose) for s in (ONE, ONE))
    together = combine([one, two], weights=[0.5, 0.5]).state
    assert (together.spec.targets, together.spec.train) == (ONE.spec.targets, ("score",))
    assert (together.spec.dropout, together.spec.seed, together.purpose) == (0.1, 5, purpose)
    assert together.base == ONE.base
    assert combine([one, ONE], weights=[0.5, 0.5]).state.purpose == purpose  # the other does not say
    other = replace(ONE, purpose=Purpose("causal-lm", "text"))
    assert combine([one, other], weights=[0.5, 0.5]).state.purpose is None


def test_layers_where_nothing_acts_are_not_meant() -> None:
    pruned = trained(AdapterSpec(AdaLoRA(1, 2), Targets("up")), 3)
    pruned.updates[1].tensors["gain"].zero_()
    together = combine([pruned, pruned]).state
    assert {match.site.key for match in resolve(together.spec, sites(Blocks()))} == {"h.0.up"}


def test_a_truncated_adapter_keeps_its_spec_but_for_the_method() -> None:
    cut = truncate(ONE, 1).state
    assert cut.spec == replace(ONE.spec, method=LoRA(1, 1.0), overrides=())
    assert cut.trained.keys() == ONE.trained.keys()


@pytest.mark.parametrize("format", ["peft", "native"])
def test_it_is_saved_and_read_back(tmp_path: Path, format: Any) -> None:
    together = combine([ONE, TWO], "linear", [1.0, 0.5]).state
    save(together, tmp_path / "both", format)
    again = load(tmp_path / "both")
    assert again.spec == together.spec
    for key, change in deltas(together).items():
        assert torch.equal(deltas(again)[key], change)


def test_peft_computes_the_same(tmp_path: Path) -> None:
    from peft import PeftModel

    together = combine([ONE, TWO], "concat", [1.0, 0.5]).state
    save(together, tmp_path / "both")
    torch.manual_seed(0)
    ours, x = Blocks(), torch.randn(4, 6)
    torch.manual_seed(0)
    theirs: Any = PeftModel.from_pretrained(Blocks(), str(tmp_path / "both"))  # type: ignore[arg-type]
    attach(ours, together)
    assert_close(ours(x), theirs(x))


def test_every_result_is_a_lora_of_scale_1() -> None:
    states = [adapter(LoRA(2, 5.0)), adapter(LoRA(2, 5.0))]
    for made in (combine(states), combine(states, "factorwise"), average_factors(states)):
        for u in made.state.updates:
            assert isinstance(u.method, LoRA)
            assert (u.method.scale, u.method.stabilised) == (1.0, False)
        assert made.losses.keys() == {Q.key, V.key}


def test_the_whole_error_is_of_one_long_vector() -> None:
    together = truncate(adapter(LoRA(4)), 2)
    errors, sizes = zip(*((loss.error, loss.size) for loss in together.losses.values()), strict=True)
    assert together.error == pytest.approx((sum(e**2 for e in errors) / sum(s**2 for s in sizes)) ** 0.5)
