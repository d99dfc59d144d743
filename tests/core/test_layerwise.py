"""The layer-wise preset: the published bands, rescaled, with its budget-matched baseline."""

from __future__ import annotations

import pytest

from lorakit.core.layerwise import PROFILES, uniform_rank
from lorakit.core.method import Method
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.core.targets import resolve
from lorakit.errors import SpecError
from lorakit.methods.adalora import AdaLoRA
from lorakit.methods.adaptive import Adaptive
from lorakit.methods.dora import DoRA
from lorakit.methods.hierarchical import Hierarchical
from lorakit.methods.lora import LoRA
from lorakit.methods.vera import VeRA


def test_32_layers_give_the_published_means() -> None:
    assert uniform_rank(PROFILES["low"].by_layer(32)) == 10.375
    assert uniform_rank(PROFILES["high"].by_layer(32)) == 34.75
    assert PROFILES["low"].by_layer(32) == [2] * 6 + [8] * 12 + [16] * 14


@pytest.mark.parametrize("depth", [2, 6, 12, 80])
def test_every_layer_has_a_rank_at_any_depth(depth: int) -> None:
    ranks = PROFILES["high"].by_layer(depth)
    assert len(ranks) == depth
    assert ranks == sorted(ranks)
    assert ranks[-1] == 64


@pytest.mark.parametrize("stabilised", [False, True])
def test_every_layer_keeps_the_method_s_scale(stabilised: bool) -> None:
    method = LoRA(16, 32.0, stabilised)
    spec = AdapterSpec(method, Targets("q_proj"), overrides=tuple(PROFILES["low"].overrides(method, 6)))
    from transformers import LlamaConfig

    from tests.core.test_targets import skeleton

    config = LlamaConfig(num_hidden_layers=6, hidden_size=32, intermediate_size=64, num_attention_heads=4)
    found = [m.method for m in resolve(spec, skeleton(config))]
    assert [m.rank for m in found] == PROFILES["low"].by_layer(6)  # type: ignore[attr-defined]
    assert all(abs(m.scale - method.scale) < 1e-12 for m in found)  # type: ignore[attr-defined]


def test_what_wraps_a_method_hands_it_the_rank_and_the_alpha() -> None:
    method = DoRA(LoRA(16, 32.0))
    spec = AdapterSpec(method, overrides=PROFILES["low"].overrides(method, 6))
    assert [spec.method_with(one) for one in spec.overrides] == [DoRA(LoRA(r, 2.0 * r)) for r in (2, 8, 16)]


@pytest.mark.parametrize("method", [AdaLoRA(), Adaptive(), DoRA(VeRA()), Hierarchical(), VeRA()])
def test_a_method_whose_layers_cannot_each_have_a_rank_is_refused(method: Method) -> None:
    with pytest.raises(SpecError, match=f"a rank and an alpha of its own, which {method.name} cannot have"):
        PROFILES["low"].overrides(method, 6)
