"""Pace: operations against torch's own counter, times by hand, money only where it was asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lorakit.errors import SpecError
from lorakit.planning.devices import Device, device
from lorakit.planning.pace import Bill, Duration, Measured, bill, flops_per_token, from_steps, from_throughput

TOKENS, WIDTH, INNER, RANK = 20, 64, 96, 4
MATRICES, ADAPTERS = 2 * WIDTH * INNER, 2 * RANK * (WIDTH + INNER)


class Adapted(nn.Module):
    """A linear layer with a LoRA branch of rank 4, or without one and trained itself."""

    def __init__(self, in_: int, out: int, full: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, in_), requires_grad=full)
        self.down = None if full else nn.Parameter(torch.randn(RANK, in_))
        self.up = None if full else nn.Parameter(torch.randn(out, RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight.T
        return y if self.down is None or self.up is None else y + (x @ self.down.T) @ self.up.T


def counted(full: bool, below: bool) -> int:
    """Return the FLOP torch counts for one step of two layers; `below` asks for the gradient of the first input."""
    model = nn.Sequential(Adapted(WIDTH, INNER, full), Adapted(INNER, WIDTH, full))
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(TOKENS, WIDTH, requires_grad=below)).sum().backward()
    return counter.get_total_flops()


def test_a_full_step_is_6n() -> None:
    assert counted(full=True, below=True) == TOKENS * flops_per_token(MATRICES, full=True) == TOKENS * 6 * MATRICES


def test_a_lora_step_is_4n_and_6p() -> None:
    expected = TOKENS * flops_per_token(MATRICES, ADAPTERS)
    assert counted(full=False, below=True) == expected == TOKENS * (4 * MATRICES + 6 * ADAPTERS)


def test_the_lowest_layer_passes_no_gradient_on() -> None:
    first = WIDTH * INNER  # of the base; and of the adapter the first factor's
    assert counted(full=True, below=False) == TOKENS * flops_per_token(MATRICES, full=True, unreached=first)
    lora = flops_per_token(MATRICES, ADAPTERS, unreached=first + RANK * WIDTH)
    assert counted(full=False, below=False) == TOKENS * lora


def test_attention_is_12_lhs_and_half_of_it_causal() -> None:
    heads, each, context = 4, 8, 10
    q, k, v = (torch.randn(heads, context, each, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        ((q @ k.transpose(1, 2)) @ v).sum().backward()
    # seen from one layer; every token attends to all of the context
    whole = flops_per_token(0, layers=1, width=heads * each, context=context, causal=False)
    assert counter.get_total_flops() == context * whole == context * 12 * 32 * 10
    assert flops_per_token(0, layers=1, width=32, context=10) == whole // 2


def test_checkpointing_is_one_more_forward() -> None:
    assert flops_per_token(1000, full=True, checkpointing=True) == 8000
    assert flops_per_token(1000, 10, checkpointing=True) == 4060 + 2020
    attention = {"layers": 2, "width": 8, "context": 5, "causal": False}
    more = flops_per_token(0, **attention, checkpointing=True) - flops_per_token(0, **attention)  # type: ignore[arg-type]
    assert more == 4 * 2 * 8 * 5


def test_lora_on_7b_saves_a_third_and_never_more() -> None:
    matrices, adapters = 6_476_005_376 + 32_000 * 4096, 39_976_960  # the output layer is a matrix, the embedding is not
    ratio = flops_per_token(matrices, adapters) / flops_per_token(matrices, full=True)
    assert ratio == pytest.approx(0.6727, abs=5e-5)
    assert 1 / ratio < 1.5


def test_time_is_work_over_what_the_device_reaches() -> None:
    slow = Device("slow", 1, bf16=200.0)
    took = from_throughput(7000.0, slow)
    assert (took.seconds, took.fastest, took.slowest) == pytest.approx((100.0, 70.0, 175.0))
    assert from_throughput(7000.0, slow, devices=2).seconds == pytest.approx(50.0)
    sure = from_throughput(7000.0, slow, utilisation=0.5)
    assert sure.seconds == sure.fastest == sure.slowest == pytest.approx(70.0)
    assert from_throughput(312e12 * 0.35, device("A100 40GB")).seconds == pytest.approx(1.0)


def test_an_assumption_is_said_to_be_one() -> None:
    assert from_throughput(1e15, device("A100 40GB")).reason == ("35% of 312 TFLOP/s in bf16 on 1 x A100 40GB, assumed")


def test_a_utilisation_that_cannot_be_is_refused() -> None:
    for share in (0.0, 1.5, -1.0):
        with pytest.raises(SpecError, match="utilisation is a share"):
            from_throughput(1.0, device("L4"), utilisation=share)
    with pytest.raises(SpecError, match="T4: no throughput is known in bf16"):
        from_throughput(1.0, device("T4"))


def test_measured_steps_give_the_time_and_its_range() -> None:
    steps = [Measured(100, 4.0), Measured(100, 1.0), Measured(50, 1.0)]
    took = from_steps(steps, tokens=3000, extra_seconds=5.0)
    assert took.seconds == pytest.approx(3000 * 2 / 150 + 5)  # the first step warms up
    assert took.fastest == pytest.approx(3000 * 1 / 100 + 5)
    assert took.slowest == pytest.approx(3000 * 4 / 100 + 5)
    assert took.reason == "75 tokens/s over 2 of 3 measured steps"


def test_steps_that_say_nothing_are_refused() -> None:
    with pytest.raises(SpecError, match="two measured steps or more, the first of which warms up, not 1"):
        from_steps([Measured(1, 1.0)], 10)
    with pytest.raises(SpecError, match="has tokens and takes time"):
        from_steps([Measured(1, 1.0), Measured(0, 1.0)], 10)


def test_energy_and_money_are_told_only_where_they_were_asked_for() -> None:
    hour = Duration(3600.0, 1.0, 2.0, "")
    assert bill(hour) == Bill(None, None, None)
    assert bill(hour, watts=500, devices=2) == Bill(1.0, None, None)
    assert bill(hour, watts=500, devices=2, price_per_kwh=0.3) == Bill(1.0, 0.3, None)
    assert bill(hour, price_per_hour=2.5, devices=4) == Bill(None, None, 10.0)
    with pytest.raises(SpecError, match="needs the watts"):
        bill(hour, price_per_kwh=0.3)


def test_json_has_plain_values() -> None:
    assert Duration(1.0, 0.5, 2.0, "why").to_json() == {"seconds": 1.0, "fastest": 0.5, "slowest": 2.0, "reason": "why"}
    assert Bill(1.0, None, 2.0).to_json() == {"kwh": 1.0, "energy_price": None, "hire": 2.0}
