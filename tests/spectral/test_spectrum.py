"""The spectrum of an adapter: a row for each module as it is, and no row where there is no dW."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lorakit.core.method import Method
from lorakit.core.site import Site
from lorakit.core.spec import AdapterSpec, Override, Targets
from lorakit.core.state import AdapterState, Update
from lorakit.errors import AdapterFileError, SpecError
from lorakit.inject.attach import adapters_named, attach, state
from lorakit.methods.dora import DoRA
from lorakit.methods.houlsby import Houlsby
from lorakit.methods.lora import LoRA
from lorakit.methods.mixture import Mixture
from lorakit.spectral.spectrum import Spectra, spectrum
from lorakit.spectral.svd import matrix_view
from tests.law.cases import CONTEXTS, METHODS, STATIC, jitter, net, weight_of


def made(**methods: Method) -> AdapterState:
    """Return an adapter of one update a name, all at weights (8, 12), with random tensors."""
    updates = []
    for path, method in methods.items():
        site = Site(path, 8, 12)
        updates.append(Update(site, method, {name: torch.rand(d.shape) for name, d in method.tensors(site).items()}))
    return AdapterState(AdapterSpec(next(iter(methods.values()))), tuple(updates))


def by_hand() -> AdapterState:
    """Return dW = 2 diag(2, 1, 1) in the corner of (8, 12), as a LoRA of rank 4 with s = 2; its last direction is 0."""
    p = {"down": torch.eye(4, 12), "up": torch.diag(torch.tensor([2.0, 1.0, 1.0, 0.0, 0, 0, 0, 0]))[:, :4]}
    return AdapterState(AdapterSpec(LoRA(4, 8.0)), (Update(Site("layer", 8, 12), LoRA(4, 8.0), p),))


def test_by_hand() -> None:
    (row,) = spectrum(by_hand(), {"layer": torch.full((8, 12), 0.5)})
    assert row.singular_values == pytest.approx((4.0, 2.0, 2.0, 0.0))
    assert row.norm == pytest.approx(math.sqrt(24))
    assert row.norm_ratio == pytest.approx(1.0), "the weight's norm is sqrt(96 / 4)"
    assert (row.key, row.method, row.shape, row.rank) == ("layer", "lora", (8, 12), 3)
    assert row.energy == pytest.approx((4 / 6, 5 / 6, 1, 1))
    assert row.effective_ranks == pytest.approx(
        {"entropy": 2 * math.sqrt(2), "stable": 1.5, "participation": 2.0, "nuclear": 8 / 3}
    )
    assert row.rank_at(0.9) == 3
    assert not row.dead
    assert not row.saturated()


@pytest.mark.parametrize(("kind", "name"), STATIC)
def test_every_update_of_a_weight_has_one(kind: str, name: str) -> None:
    model = net(kind, name)
    weight = weight_of(model)
    delta = adapters_named(model, "n0")[0].delta(weight).detach()
    given = state(model, "n0")
    (row,) = spectrum(given, {"layer": weight})
    assert row.method == METHODS[name].name
    assert row.norm == pytest.approx(float(delta.norm()), rel=1e-5)
    assert row.weight_norm == pytest.approx(float(weight.norm()), rel=1e-6)
    assert row.shape == matrix_view(given.updates[0].site, weight).shape
    assert row.rank <= given.updates[0].site.max_rank
    assert len(row.singular_values) <= row.shape[0]


class Three(nn.Module):
    """Layers whose names are in no order."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.a, self.b = nn.Linear(12, 8), nn.Linear(8, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        """Return the last layer's output."""
        y: Tensor = self.b(self.a(self.c(x)))
        return y


def test_the_rows_are_sorted_as_the_state() -> None:
    model = Three()
    attach(model, AdapterSpec(LoRA(4), Targets(["a", "b", "c"]), overrides=[Override.of("a", rank=2)]))
    for adapter in adapters_named(model, "default"):
        jitter(adapter)
    given = state(model)
    found = spectrum(given)
    assert [row.key for row in found] == [u.site.key for u in given.updates]
    assert found.by_key["a"].rank == 2
    assert len(found) == 3
    assert all(row.weight_norm is None and row.norm_ratio is None for row in found)
    backwards = spectrum(replace(given, updates=given.updates[::-1]))
    assert backwards.modules == found.modules[::-1]


def test_dead_and_saturated_updates_are_named() -> None:
    given = made(first=LoRA(4), second=LoRA(4), third=LoRA(4))
    given.updates[0].tensors["up"].zero_()
    for i, size in enumerate((1.0, 1.0, 1.0, 1.0)):
        given.updates[1].tensors["up"][:, i] = size * torch.eye(8)[i]
    given.updates[1].tensors["down"].copy_(torch.eye(4, 12))
    found = spectrum(given)
    assert found.dead == ("first",)
    assert found.saturated() == ("second",)
    assert found.by_key["first"].effective_ranks == dict.fromkeys(found.by_key["first"].effective_ranks, 0.0)
    assert found.by_key["first"].rank == 0


def test_a_slice_of_a_fused_layer_has_a_row_of_its_own() -> None:
    site, whole = Site("qkv", 24, 12), LoRA(2)
    updates = tuple(
        Update(part, whole, {name: torch.rand(d.shape) for name, d in whole.tensors(part).items()})
        for part in (site.slice(0, 8), site.slice(16, 24))
    )
    found = spectrum(AdapterState(AdapterSpec(whole), updates), {u.site.key: torch.ones(8, 12) for u in updates})
    assert [(row.key, row.shape) for row in found] == [("qkv[0:8]", (8, 12)), ("qkv[16:24]", (8, 12))]


def test_it_is_a_value_and_json() -> None:
    found, again = spectrum(by_hand()), spectrum(by_hand())
    assert found == again
    assert hash(found) == hash(again)
    for given in (found, spectrum(by_hand(), {"layer": torch.zeros(8, 12)}), Spectra(())):
        text = json.dumps(given.to_json(), allow_nan=False)
        assert json.loads(text) == given.to_json()
    (row,) = found.to_json()["modules"]
    assert row["singular_values"] == pytest.approx([4.0, 2.0, 2.0, 0.0])
    assert (row["rank"], row["shape"], row["weight_norm"], row["norm_ratio"]) == (3, [8, 12], None, None)
    assert set(row["effective_ranks"]) == {"entropy", "stable", "participation", "nuclear"}


def test_the_state_stays_as_it_was() -> None:
    given = made(layer=LoRA(4))
    before = {name: t.clone() for name, t in given.updates[0].tensors.items()}
    spectrum(given)
    assert all(torch.equal(t, before[name]) for name, t in given.updates[0].tensors.items())


def test_trained_weights_and_an_adapter_without_updates_have_no_row() -> None:
    assert spectrum(AdapterState(AdapterSpec(None, train=("biases",)), (), {"bias": torch.ones(3)})) == Spectra(())


class Lazy(Mapping[str, Tensor]):
    """Makes a weight when it is asked for, and remembers how many of those it made are held at once."""

    keys_ = tuple("abcdefgh")

    def __init__(self) -> None:
        self.made: dict[str, weakref.ref[Tensor]] = {}
        self.most = 0

    def __getitem__(self, key: str) -> Tensor:
        weight = torch.ones(8, 12)
        self.made[key] = weakref.ref(weight)
        self.most = max(self.most, sum(ref() is not None for ref in self.made.values()))
        return weight

    def __contains__(self, key: object) -> bool:
        return key in self.keys_

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_)

    def __len__(self) -> int:
        return len(self.keys_)


def test_a_lazy_base_is_held_one_weight_at_a_time() -> None:
    base = Lazy()
    spectrum(made(**dict.fromkeys(base.keys_, LoRA(2))), base)
    assert set(base.made) == set(base.keys_)
    assert base.most <= 2, "one, and one that the tests' own shape checks look at"


def test_what_is_no_change_of_a_weight_is_refused_with_all_their_names() -> None:
    model = Site("model", 8, 2, (2, 4), kind="model")
    context = CONTEXTS["prompt-tuning"]
    read = Update(model, context, {name: torch.zeros(d.shape) for name, d in context.tensors(model).items()})
    given = made(a=LoRA(2), b=Mixture(2, 2), c=Houlsby(2))
    with pytest.raises(SpecError) as caught:
        spectrum(replace(given, updates=(*given.updates, read)))
    assert str(caught.value) == (
        "3 update(s) are no change of a weight, so they have no spectrum:\n"
        "  - b: mixture depends on the input\n"
        "  - c: houlsby depends on the input\n"
        "  - model: prompt-tuning acts on what the model reads, not on a weight"
    )


def test_nan_is_refused_with_the_names_of_its_modules() -> None:
    given = made(a=LoRA(2), b=LoRA(2), c=LoRA(2))
    given.updates[0].tensors["up"][0, 0] = math.nan
    given.updates[2].tensors["down"][0, 0] = math.inf
    with pytest.raises(AdapterFileError, match=r"(?s)2 adapter tensor.*- a\.up: holds NaN .*- c\.down: holds NaN"):
        spectrum(given)


def test_a_change_that_depends_on_the_weight_asks_for_it_everywhere() -> None:
    given = made(a=DoRA(LoRA(2)), b=LoRA(2), c=DoRA(LoRA(2)))
    with pytest.raises(SpecError) as caught:
        spectrum(given)
    assert str(caught.value) == (
        "the weights of 2 update(s) are missing or do not fit:\n"
        "  - a: the change that dora makes depends on the weight; give the base's\n"
        "  - c: the change that dora makes depends on the weight; give the base's"
    )


def test_a_base_that_does_not_fit_is_refused_everywhere() -> None:
    base = {"a": torch.ones(12, 8), "b": torch.full((8, 12), math.nan), "d": torch.ones(8, 12)}
    with pytest.raises(SpecError) as caught:
        spectrum(made(a=LoRA(2), b=LoRA(2), c=LoRA(2), d=LoRA(2)), base)
    assert str(caught.value) == (
        "the weights of 3 update(s) are missing or do not fit:\n"
        "  - a: the base's weight is (12, 8), expected (8, 12) (canonical layout)\n"
        "  - b: the base's weight holds NaN or infinity\n"
        "  - c: the base has no weight of this name; give it by the key of its site"
    )


def test_sites_of_unknown_width_ask_for_the_base() -> None:
    given = made(a=LoRA(2))
    with pytest.raises(SpecError, match="does not tell how wide these layers are; name the base:\n  - a"):
        spectrum(replace(given, updates=(replace(given.updates[0], site=Site("a", 8, 0)),)))
