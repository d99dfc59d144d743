"""How two adapters differ is measured on what they do, and told beside what they were set to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lorakit.combining import Gap, difference
from lorakit.core.site import Site
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.core.state import AdapterState, Base, Update, delta_of
from lorakit.errors import CombineError
from lorakit.methods.dora import DoRA
from lorakit.methods.lora import LoRA
from lorakit.methods.mixture import Mixture

SITE = Site("q", 3, 2)
Rows = list[list[float]]


def lora(
    down: list[list[float]], up: list[list[float]], alpha: float, path: str = "q", **fields: object
) -> AdapterState:
    method = LoRA(len(down), alpha, **fields)  # type: ignore[arg-type]
    update = Update(replace(SITE, path=path), method, {"down": torch.tensor(down), "up": torch.tensor(up)})
    return AdapterState(AdapterSpec(method, Targets((path,))), (update,), base=Base("b"))


E1 = lora([[1.0, 0.0]], [[3.0], [0.0], [0.0]], 1.0)
"""dW = 3 at (0, 0)."""


def test_a_gap_is_known_by_hand() -> None:
    found = difference(E1, lora([[0.0, 2.0]], [[0.0], [2.0], [0.0]], 1.0))  # dW = 4 at (1, 1)
    gap = found.weights["q"]
    assert (gap.first, gap.second, gap.apart) == pytest.approx((3, 4, 5))
    assert gap.relative == pytest.approx(5 / 4)
    assert gap.alignment == pytest.approx(0.0, abs=1e-7)
    assert not found.same


def test_other_settings_can_do_the_same() -> None:
    """Rank 1 at alpha 1 is rank 2 with a half of nothing at alpha 4; rsLoRA divides by sqrt(r), not r."""
    wide = lora([[1.0, 0.0], [0.0, 1.0]], [[1.5, 0.0], [0.0, 0.0], [0.0, 0.0]], 4.0)
    found = difference(E1, wide)
    assert found.same
    assert found.settings == {"method.rank": (1, 2), "method.alpha": (1.0, 4.0)}
    assert found.weights["q"].relative == 0
    stabilised = lora([[1.0, 0.0], [0.0, 1.0]], [[1.5, 0.0], [0.0, 0.0], [0.0, 0.0]], 8.0**0.5, stabilised=True)
    assert difference(E1, stabilised).same


def test_an_adapter_differs_from_itself_in_nothing_and_from_its_negative_in_everything() -> None:
    assert difference(E1, E1).same
    assert difference(E1, E1).settings == {}
    against = difference(E1, lora([[-1.0, 0.0]], [[3.0], [0.0], [0.0]], 1.0)).weights["q"]
    assert (against.relative, against.alignment) == pytest.approx((2.0, -1.0))


def test_products_and_matrices_are_compared_alike() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 2)
    dora = DoRA(LoRA(1, 1.0))
    tensors = {"down": torch.randn(1, 2), "up": torch.randn(3, 1), "magnitude": torch.rand(3) + 1}
    other = AdapterState(AdapterSpec(dora), (Update(SITE, dora, tensors),), base=Base("b"))
    gap = difference(E1, other, {"q": weight}).weights["q"]
    deltas = [delta_of(state.updates[0], weight).double() for state in (E1, other)]  # type: ignore[union-attr]
    assert gap.apart == pytest.approx(float((deltas[0] - deltas[1]).norm()), rel=1e-5)
    cosine = torch.nn.functional.cosine_similarity(*(d.flatten() for d in deltas), dim=0)
    assert gap.alignment == pytest.approx(float(cosine), rel=1e-4)
    with pytest.raises(CombineError, match="q: dora's change of this weight depends on the weight"):
        difference(E1, other)


def test_what_only_one_has_differs_wholly() -> None:
    found = difference(E1, lora([[1.0, 0.0]], [[3.0], [0.0], [0.0]], 1.0, path="k"))
    assert {key: (gap.first, gap.second, gap.relative) for key, gap in found.weights.items()} == {
        "q": (pytest.approx(3.0), 0.0, 1.0),
        "k": (0.0, pytest.approx(3.0), 1.0),
    }
    total = found.total
    assert (total.first, total.second, total.apart) == pytest.approx((3, 3, 18**0.5))
    assert found.settings["targets.include"] == (["q"], ["k"])


def test_tensors_trained_whole_are_compared_by_name() -> None:
    one = replace(E1, trained={"head.weight": torch.ones(2, 2), "norm.weight": torch.ones(2)})
    other = replace(E1, trained={"head.weight": torch.zeros(2, 2), "norm.weight": torch.ones(2)})
    found = difference(one, other)
    assert found.tensors["head.weight"] == Gap(2.0, 0.0, 2.0)
    assert found.tensors["norm.weight"].relative == 0
    assert not found.same
    resized = difference(one, replace(one, trained={**one.trained, "head.weight": torch.ones(3, 2)}))
    assert resized.tensors["head.weight"].apart == pytest.approx(10**0.5), "of another shape, nothing is alike"


def test_a_mixture_is_compared_by_its_tensors() -> None:
    method = Mixture(2, 1, 1.0)
    torch.manual_seed(0)
    tensors = {name: torch.randn(decl.shape) for name, decl in method.tensors(SITE).items()}
    one = AdapterState(AdapterSpec(method), (Update(SITE, method, tensors),), base=Base("b"))
    moved = {name: tensor + 1 for name, tensor in tensors.items()}
    other = replace(one, updates=(Update(SITE, method, moved),))
    assert difference(one, one).same
    found = difference(one, other)
    assert not found.same
    assert set(found.moving) == {f"q.{name}" for name in tensors}


def test_adapters_of_other_bases_are_refused() -> None:
    with pytest.raises(CombineError, match="name other bases, b and c"):
        difference(E1, replace(E1, base=Base("c")))
