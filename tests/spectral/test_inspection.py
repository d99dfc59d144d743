"""An adapter looked at module by module: every number is its own function's, and each weight is read once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lorakit.core.site import Site
from lorakit.core.spec import AdapterSpec
from lorakit.core.state import AdapterState, Base, Update
from lorakit.errors import AdapterFileError, SpecError
from lorakit.methods.dora import DoRA
from lorakit.methods.lora import LoRA
from lorakit.methods.mixture import Mixture
from lorakit.spectral.amplification import amplification, correlation
from lorakit.spectral.inspection import ITERATIONS, inspect
from lorakit.spectral.interference import interference
from lorakit.spectral.intruder import intruders
from lorakit.spectral.spectrum import spectrum
from lorakit.spectral.subspace import similarities
from lorakit.spectral.svd import svd


def adapter(seed: int = 0, rank: int = 4, paths: tuple[str, ...] = ("0.q", "1.q"), probe: float = 0.5) -> AdapterState:
    """Return random LoRAs on weights (12, 16)."""
    rng = torch.Generator().manual_seed(seed)
    method = LoRA(rank, float(rank))
    updates = [
        Update(Site(path, 12, 16), method, {"down": torch.randn(rank, 16, generator=rng),
                                            "up": torch.randn(12, rank, generator=rng)})
        for path in paths
    ]  # fmt: skip
    return AdapterState(AdapterSpec(method), tuple(updates), base=Base("a", {"0.q": (probe,)}))


class Read(Mapping[str, Tensor]):
    """Weights that count how often each is read."""

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(9)
        self.weights = {path: torch.randn(12, 16, generator=rng) for path in ("0.q", "1.q", "2.q")}
        self.reads: list[str] = []

    def __getitem__(self, key: str) -> Tensor:
        self.reads.append(key)
        return self.weights[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def test_every_number_is_that_of_its_own_function() -> None:
    state, other, base = adapter(), adapter(1, rank=6), Read()
    found = inspect(state, base, other, energy=0.8, count_intruders=True)
    assert base.reads.count("1.q") == 1, "of the first, the tests' own type checks take a look"
    plain = spectrum(state, base.weights)
    for update, theirs, module, row in zip(state.updates, other.updates, found.modules, plain, strict=True):
        weight, own, second = base.weights[row.key], svd(update), svd(theirs)
        assert module.spectrum.singular_values == pytest.approx(row.singular_values)
        assert module.spectrum.norm_ratio == pytest.approx(row.norm_ratio)
        assert module.needs == row.rank_at(0.8)
        held = amplification(own, weight, module.needs, ITERATIONS, torch.Generator().manual_seed(0), values=64)
        assert module.projections == held
        assert held.decay == pytest.approx(torch.linalg.svdvals(weight).tolist(), rel=1e-3)
        assert module.correlation == pytest.approx(correlation(own, weight))
        assert module.intruders == intruders(weight, (own.u * own.s @ own.vh).float()).count
        assert module.met == interference(own, second)
        assert module.grid is not None
        assert torch.allclose(torch.tensor(module.grid, dtype=torch.float64), similarities(own.vh[:4], second.vh[:6]))
    assert json.loads(json.dumps(found.to_json()))["modules"][0]["interference"]["forecast"] == "disturbed"


def test_correlation_by_hand() -> None:
    """dW = diag(1, 2), W = diag(3, -1): <,> = 1, norms sqrt 5 and sqrt 10."""
    update = Update(Site("a", 2, 2), LoRA(2, 2.0), {"down": torch.eye(2), "up": torch.diag(torch.tensor([1.0, 2.0]))})
    weight = torch.diag(torch.tensor([3.0, -1.0]))
    assert correlation(svd(update), weight) == pytest.approx(1 / 50**0.5)
    dense = torch.randn(2, 2)
    assert correlation(svd(update), dense) == pytest.approx(
        float(torch.cosine_similarity(torch.diag(torch.tensor([1.0, 2.0])).flatten(), dense.flatten(), 0)), rel=1e-5
    )


def test_without_a_base_what_asks_for_one_is_left_out_and_an_update_of_0_is_named() -> None:
    state = adapter()
    still = replace(state.updates[1], tensors={**state.updates[1].tensors, "up": torch.zeros(12, 4)})
    found = inspect(replace(state, updates=(state.updates[0], still)), None, adapter(1))
    first, dead = found.modules
    assert (first.projections, first.correlation, first.intruders) == (None, None, None)
    assert first.met is not None
    assert (dead.spectrum.dead, dead.needs, dead.met, dead.grid) == (True, 0, None, None)
    with_base = inspect(replace(state, updates=(still,)), Read())
    assert with_base.modules[0].projections is None


def test_layers_of_one_adapter_alone_are_told() -> None:
    found = inspect(adapter(), None, adapter(1, paths=("1.q", "2.q")))
    assert (found.only_first, found.only_second) == (("0.q",), ("2.q",))
    assert [module.met is None for module in found.modules] == [True, False]


def test_what_cannot_be_compared_or_looked_at_is_refused() -> None:
    with pytest.raises(SpecError, match=r"different bases.*\n.*0\.q: another weight"):
        inspect(adapter(), None, adapter(1, probe=3.0))
    with pytest.raises(SpecError, match="no layer in common"):
        inspect(adapter(), None, adapter(1, paths=("7.q",)))
    taller = adapter(1)
    taller = replace(taller, updates=tuple(replace(u, site=Site(u.site.path, 13, 16), tensors={
        "down": torch.zeros(4, 16), "up": torch.zeros(13, 4)}) for u in taller.updates))  # fmt: skip
    with pytest.raises(SpecError, match=r"0\.q: \(12, 16\) and \(13, 16\)"):
        inspect(adapter(), None, taller)
    stretched = adapter()
    method = DoRA(LoRA(4, 4.0))
    tensors = {**stretched.updates[0].tensors, "gain": torch.ones(12)}
    names = method.tensors(Site("0.q", 12, 16)).keys()
    made = {name: tensors.get(name, torch.ones(12)) for name in names}
    stretched = replace(stretched, updates=(replace(stretched.updates[0], method=method, tensors=made),))
    with pytest.raises(SpecError, match=r"0\.q: .*give the base's"):
        inspect(stretched)
    assert inspect(stretched, Read()).modules[0].spectrum.norm > 0
    broken = adapter()
    broken.updates[0].tensors["up"][0, 0] = float("nan")
    with pytest.raises(AdapterFileError, match="holds NaN"):
        inspect(broken)
    with pytest.raises(SpecError, match="2 update"):
        inspect(adapter(), {})
    site = Site("0.q", 12, 16)
    mixture = Mixture(experts=2, rank=2)
    moving = Update(site, mixture, {name: torch.ones(d.shape) for name, d in mixture.tensors(site).items()})
    with pytest.raises(SpecError, match="depends on the input"):
        inspect(replace(adapter(), updates=(moving,)))
