"""The presets have the published totals, to the parameter."""

from __future__ import annotations

import pytest

from lorakit.errors import SpecError
from lorakit.inject.sites import sites
from lorakit.inject.skeleton import config_of, on_meta
from lorakit.planning.shapes import SHAPES, shape


def llama(d: int, i: int, layers: int, vocabulary: int, kv: int) -> int:
    """Count a LLaMA by hand: embedding and head, and in each layer q, o, k, v, three of the MLP and two norms."""
    return 2 * vocabulary * d + d + layers * (2 * d * d + 2 * d * kv + 3 * d * i + 2 * d)


def gpt2(d: int, layers: int, positions: int) -> int:
    """Count a GPT-2 by hand: tied embedding, positions; in each layer 12 d^2 weights, 9 d biases and norms of 4 d."""
    return (50257 + positions) * d + 2 * d + layers * (12 * d * d + 13 * d)


TOTALS = {
    "llama-7b": (6_738_415_616, llama(4096, 11008, 32, 32000, 4096)),
    "llama-13b": (13_015_864_320, llama(5120, 13824, 40, 32000, 5120)),
    "llama-65b": (65_285_660_672, llama(8192, 22016, 80, 32000, 8192)),
    "llama-2-7b": (6_738_415_616, llama(4096, 11008, 32, 32000, 4096)),
    "llama-2-70b": (68_976_648_192, llama(8192, 28672, 80, 32000, 1024)),
    "llama-3-8b": (8_030_261_248, llama(4096, 14336, 32, 128256, 1024)),
    "llama-3-70b": (70_553_706_496, llama(8192, 28672, 80, 128256, 1024)),
    "mistral-7b": (7_241_732_096, llama(4096, 14336, 32, 32000, 1024)),
    "gpt2": (124_439_808, gpt2(768, 12, 1024)),
    "gpt2-medium": (354_823_168, gpt2(1024, 24, 1024)),
    "gpt2-large": (774_030_080, gpt2(1280, 36, 1024)),
    "gpt2-xl": (1_557_611_200, gpt2(1600, 48, 1024)),
    "gpt3-175b": (174_604_259_328, gpt2(12288, 96, 2048)),
}
"""The published total (GPT-3's paper says 175.0 billion), and the same by hand."""


def test_every_preset_has_its_total_here() -> None:
    assert set(TOTALS) == set(SHAPES)
    assert round(TOTALS["gpt3-175b"][0] / 1e9) == 175


@pytest.mark.parametrize("name", TOTALS)
def test_a_preset_has_the_published_number_of_parameters(name: str) -> None:
    published, by_hand = TOTALS[name]
    assert sites(on_meta(config_of(shape(name)))).total_parameters == published == by_hand


def test_a_shape_is_the_caller_s_own() -> None:
    mine = shape("gpt2")
    mine["n_layer"] = 1
    mine.clear()
    assert shape("gpt2")["n_layer"] == 12


def test_an_unknown_shape_lists_the_near_ones_and_all() -> None:
    with pytest.raises(SpecError, match="unknown shape 'llama2-7b'; did you mean 'llama-2-7b'") as raised:
        shape("llama2-7b")
    assert all(name in str(raised.value) for name in SHAPES)
