"""The specification's memory tables, worked out again: each test's name says what is right; 1 GB is 10^9 bytes.

Sharding over devices divides weights, gradients and moments evenly, as ZeRO-3 and FSDP do.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from lorakit.planning.devices import device
from lorakit.planning.memory import (
    activations_by_formula,
    mixed_precision_parts,
    optimizer_bytes,
    trained_parts,
    weight_bytes,
)
from lorakit.planning.sharding import per_device
from tests.conftest import ROOT


@dataclass(frozen=True)
class Base:
    """A Llama-2 by its numbers: all parameters, those in linear layers but the head, and the widths of a layer."""

    total: int
    linear: int
    layers: int
    hidden: int
    inner: int
    kv: int

    def weights(self, store: str = "dense", dense_dtype: str = "bf16", double_quant: bool = True) -> int:
        """Return the bytes of the base; embeddings, head and norms are in `dense_dtype`, the rest in bf16 or packed."""
        beside = weight_bytes(self.total - self.linear, dtype=dense_dtype)
        shapes = [(self.hidden, self.linear // self.hidden)]  # as one matrix: the rows' scales are below 0.01 GB
        return beside + weight_bytes(0, shapes, store=store, double_quant=double_quant)

    def adapter(self, rank: int, everywhere: bool) -> int:
        """Return LoRA's parameters on all seven linear layers, or on queries and values."""
        h, kv, i = self.hidden, self.kv, self.inner
        values = (h + h) + (h + kv)
        return rank * self.layers * (2 * values + 3 * (h + i) if everywhere else values)


B7 = Base(6_738_415_616, 6_476_005_376, 32, 4096, 11008, 4096)
B13 = Base(13_015_864_320, 12_687_769_600, 40, 5120, 13824, 5120)
B65 = Base(65_285_660_672, 64_760_053_760, 80, 8192, 22016, 8192)
B70 = Base(68_976_648_192, 68_451_041_280, 80, 8192, 28672, 1024)

A100_40, A100_80 = device("A100 40GB").memory, device("A100 80GB").memory


def gb(number: float, digits: int = 2) -> float:
    """Return bytes in GB, rounded as the tables print them."""
    return round(number / 1e9, digits)


@pytest.mark.parametrize("base", [B7, B13, B65, B70], ids=["7B", "13B", "65B", "70B"])
def test_linear_weights_follow_from_the_widths(base: Base) -> None:
    layer = 2 * base.hidden**2 + 2 * base.hidden * base.kv + 3 * base.hidden * base.inner
    assert base.layers * layer == base.linear


def test_llama_2_7b_trains_4_194_304_or_39_976_960() -> None:
    assert B7.adapter(8, everywhere=False) == 4_194_304
    assert B7.adapter(16, everywhere=True) == 39_976_960


def test_7b_takes_13_48_gb_and_3_87_in_4_bits_not_14_and_3_5() -> None:
    assert gb(B7.weights()) == 13.48
    assert gb(B7.weights("nf4")) == 3.87
    assert gb(B7.weights("nf4", dense_dtype="fp32")) == 4.39
    assert gb(B7.weights("nf4", double_quant=False)) == 4.17


def test_7b_full_fine_tuning_takes_107_8_gb_since_there_is_a_master_copy() -> None:
    with_master, without = mixed_precision_parts(B7.total), mixed_precision_parts(B7.total, master=False)
    assert gb(with_master.gradients, 1) == 13.5
    assert gb(without.optimizer, 1) == 53.9
    assert gb(with_master.optimizer - without.optimizer, 0) == 27
    assert gb(with_master.total, 1) == 107.8


def test_lorakits_own_full_fine_tuning_of_7b_takes_the_same_107_8_gb() -> None:
    assert gb(trained_parts([B7.total], whole=True).total, 1) == 107.8


def test_7b_lora_gradients_and_moments_take_8_4_and_33_6_mb_or_80_and_320() -> None:
    few, many = B7.adapter(8, everywhere=False), B7.adapter(16, everywhere=True)
    assert round(2 * few / 1e6, 1) == 8.4
    assert round(optimizer_bytes([few]) / 1e6, 1) == 33.6
    assert round(2 * many / 1e6) == 80
    assert round(optimizer_bytes([many]) / 1e6) == 320
    assert trained_parts([few]).gradients == 2 * (2 * few)  # lorakit's are in fp32


def test_65b_takes_130_6_65_8_and_34_5_gb() -> None:
    assert gb(B65.weights(), 1) == 130.6
    assert gb(B65.weights("int8"), 1) == 65.8
    assert gb(B65.weights("nf4"), 1) == 34.5


def test_65b_qlora_takes_44_1_gb_before_activations_not_200_mb_more_than_the_base() -> None:
    small, papers = B65.adapter(8, everywhere=True), B65.adapter(64, everywhere=True)
    assert gb(2 * small, 1) == 0.2  # what the 200 MB are: rank 8, and no gradients or moments
    assert (gb(2 * papers, 1), gb(optimizer_bytes([papers]), 1)) == (1.6, 6.4)
    total = B65.weights("nf4") + 2 * papers + 2 * papers + optimizer_bytes([papers])
    assert gb(total, 1) == 44.1
    assert total < 48e9  # the paper's card
    assert gb(mixed_precision_parts(B65.total, master=False).total, 0) == 783  # its "> 780 GB" for full fine-tuning


def test_65b_activations_are_the_same_in_4_bits_and_checkpointing_is_what_shrinks_them() -> None:
    shape = {"layers": B65.layers, "hidden": B65.hidden, "sequence": 2048}
    plain = activations_by_formula(**shape, intermediate=B65.inner)
    assert gb(plain, 1) == 50.3
    assert gb(activations_by_formula(**shape, checkpointing=True), 1) == 2.7


def test_7b_full_fine_tuning_on_2_a100_40_leaves_2_5_gb_each_without_a_master_copy_and_does_not_fit_with_one() -> None:
    without, with_master = mixed_precision_parts(B7.total, master=False), mixed_precision_parts(B7.total)
    assert gb(without.total, 1) == 80.9
    left = A100_40 - per_device(without, 2, "zero3", resident=0).total
    assert gb(left, 1) == 2.5
    shape = {"layers": B7.layers, "hidden": B7.hidden, "sequence": 2048}
    assert activations_by_formula(**shape, intermediate=B7.inner) > left  # so only with full checkpointing
    assert activations_by_formula(**shape, checkpointing=True) < left
    assert per_device(with_master, 2, "zero3", resident=0).total > A100_40
    assert without.total > A100_40  # and only divided


def test_13b_full_fine_tuning_on_4_a100_40_is_marginal_without_a_master_copy_and_does_not_fit_with_one() -> None:
    without, with_master = mixed_precision_parts(B13.total, master=False), mixed_precision_parts(B13.total)
    assert (gb(without.total, 0), gb(with_master.total, 0), gb(4 * A100_40, 1)) == (156, 208, 171.8)
    assert 0 < gb(A100_40 - per_device(without, 4, "zero3", resident=0).total, 1) < 4
    assert per_device(with_master, 4, "zero3", resident=0).total > A100_40


def test_70b_full_fine_tuning_does_not_fit_8_a100_80() -> None:
    for master, total in ((False, 828), (True, 1104)):
        parts = mixed_precision_parts(B70.total, master)
        assert gb(parts.total, 0) == total
        assert per_device(parts, 8, "zero3", resident=0).total > A100_80
    assert gb(8 * A100_80, 0) == 687


def test_70b_lora_does_not_fit_2_a100_40_since_the_weights_alone_do_not() -> None:
    assert gb(B70.weights(), 0) == 138
    assert B70.weights() > 2 * A100_40
    assert gb(2 * A100_40, 1) == 85.9


def test_70b_qlora_on_one_a100_40_is_marginal_before_activations_and_meant_for_48_gb() -> None:
    assert gb(B70.weights("nf4"), 1) == 36.4
    assert gb(B70.weights("nf4", dense_dtype="fp32") - B70.weights("nf4")) == 1.05
    small, large = (trained_parts([B70.adapter(r, everywhere)]) for r, everywhere in ((8, False), (16, True)))
    assert (gb(small.total), gb(large.total, 1)) == (0.26, 3.3)
    least = B70.weights("nf4") + small.total
    most = B70.weights("nf4", dense_dtype="fp32") + large.total
    assert (gb(least, 1), gb(most, 1)) == (36.6, 40.7)
    assert most < A100_40 < most + 3e9  # 2.2 GB for activations, logits and the CUDA context
    assert most < device("L40S").memory


def test_13b_qlora_takes_8_2_gb_and_7b_4_5_and_fit_far_smaller_cards_than_an_a100_40_and_a_4090() -> None:
    thirteen = B13.weights("nf4") + trained_parts([B13.adapter(16, everywhere=True)]).total
    seven = B7.weights("nf4") + trained_parts([B7.adapter(16, everywhere=True)]).total
    assert (gb(thirteen, 1), gb(seven, 1)) == (8.2, 4.5)
    assert thirteen < device("RTX 3060").memory
    assert seven < device("8 GiB").memory


@pytest.mark.parametrize(
    ("name", "base"), [("LLaMA-2-7B", B7), ("LLaMA-2-13B", B13), ("LLaMA-65B", B65), ("Llama-2-70B", B70)]
)
def test_the_page_on_4_bits_says_what_is_worked_out_here(name: str, base: Base) -> None:
    sizes = base.weights(), base.weights("nf4"), base.weights("nf4", double_quant=False)
    row = f"| {name} | " + " | ".join(f"{gb(size):.2f} GB" for size in sizes) + " |"
    assert row in (ROOT / "docs" / "four-bits.md").read_text(encoding="utf-8")
