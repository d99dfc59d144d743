"""The plan's arithmetic is right, and docs/deployment.md shows what comes out of it."""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from pathlib import Path

import pytest

from lorakit.serving.capacity import Widths, adapter_bytes, distinct, hit_rate, need, popularity, replicas

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "deployment.md").read_text(encoding="utf-8")
RESULTS = json.loads((DOCS / "results" / "serving.json").read_text(encoding="utf-8"))["results"]
SMALL, MIDDLE = Widths(256, 256, 688, 4), Widths(768, 768, 2048, 6)
ONE_B, EIGHT_B = Widths(2048, 512, 8192, 16), Widths(4096, 1024, 14336, 32)
MEASURED = {"5M": (SMALL, "s256"), "49M": (MIDDLE, "m768")}
"""Of one process on two cores, 16 adapters of rank 8 mixed: `python bench/serving.py --parts pace --keep`."""


def test_bytes_are_those_of_the_files_that_were_measured() -> None:
    assert adapter_bytes(SMALL, 8, 4) == pytest.approx(0.625e6, rel=0.01)
    assert adapter_bytes(MIDDLE, 8, 4) == pytest.approx(2.80e6, rel=0.01)
    # 32 blocks, r = 16: q and o 8192, k and v 5120, gate, up and down 18432 numbers a rank
    assert adapter_bytes(EIGHT_B, 16, 2) == 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432) * 2


def test_shares_fall_as_one_over_the_place() -> None:
    shares = popularity(4)
    assert shares == pytest.approx([12 / 25, 6 / 25, 4 / 25, 3 / 25])
    assert popularity(4, 0.0) == [0.25] * 4


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.2])
@pytest.mark.parametrize("held", [10, 100, 400])
def test_the_hit_rate_is_that_of_a_simulated_memory(exponent: float, held: int) -> None:
    shares, rng = popularity(500, exponent), random.Random(1)
    here: OrderedDict[int, None] = OrderedDict()
    hits, asked = 0, rng.choices(range(500), shares, k=30_000)
    for number, adapter in enumerate(asked):
        hits += adapter in here and number >= 10_000
        here[adapter] = None
        here.move_to_end(adapter)
        if len(here) > held:
            here.popitem(last=False)
    assert hit_rate(shares, held) == pytest.approx(hits / 20_000, abs=0.015)


def test_the_ends_of_a_memory_are_exact() -> None:
    shares = popularity(10)
    assert (hit_rate(shares, 0), hit_rate(shares, 10), hit_rate(shares, 99)) == (0.0, 1.0, 1.0)


def test_how_many_differ_among_a_few() -> None:
    assert distinct([0.5, 0.5], 2) == pytest.approx(1.5)
    assert distinct(popularity(1000, 0.0), 1) == pytest.approx(1.0)


def test_replicas_are_rounded_up_and_leave_room() -> None:
    assert replicas(10, 70, 100) == 10
    assert replicas(10, 71, 100) == 11
    assert replicas(10, 100, 100, load=1.0) == 10


def test_a_plan_puts_them_together() -> None:
    plan = need(1000, popularity(100), 50, 10, 100, 20_000)
    assert (plan.store_bytes, plan.held, plan.replicas) == (100_000, 20, 8)
    assert plan.loads_per_second == pytest.approx((1 - plan.hit_rate) * 50 / 8)
    assert need(1000, popularity(100), 50, 10, 100, 10**9).hit_rate == 1.0


def mega(count: int) -> str:
    unit, name = (1e12, "TB") if count >= 1e12 else (1e9, "GB") if count >= 1e9 else (1e6, "MB")
    return f"{count / unit:.3g} {name}"


@pytest.mark.parametrize("memory", [10**9, 4 * 10**9])
@pytest.mark.parametrize("name", MEASURED)
def test_the_page_s_table_of_measured_bases_is_what_comes_out(name: str, memory: int) -> None:
    widths, model = MEASURED[name]
    speed = RESULTS[model]["pace"]["tokens a second"]
    plan = need(adapter_bytes(widths, 8, 4), popularity(10_000), 1000, 64, speed, memory)
    row = (
        f"| {name}, rank 8, fp32 | {mega(plan.adapter_bytes)} | {mega(plan.store_bytes)} | {mega(memory)} | "
        f"{plan.held:,} | {plan.hit_rate:.0%} | {speed:,} | {plan.replicas} | {plan.loads_per_second:.1f} |"
    )
    assert row in PAGE, row


@pytest.mark.parametrize(("name", "widths"), [("1B", ONE_B), ("8B", EIGHT_B)])
@pytest.mark.parametrize("rank", [8, 16, 64])
def test_the_page_s_table_of_sizes_is_what_comes_out(name: str, widths: Widths, rank: int) -> None:
    size, shares = adapter_bytes(widths, rank, 2), popularity(10_000)
    held = min(10_000, 64 * 10**9 // size)
    row = (
        f"| {name}, rank {rank}, bf16 | {mega(size)} | {mega(10_000 * size)} | {mega(32 * size)} | {held:,} | "
        f"{hit_rate(shares, held):.0%} |"
    )
    assert row in PAGE, row


def test_the_page_s_number_of_different_adapters_is_what_comes_out() -> None:
    assert f"stand {distinct(popularity(10_000), 64):.0f} different adapters" in PAGE
