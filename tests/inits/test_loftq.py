"""LoftQ: the loop by hand and on two quantisers, and the start that gives a quantised base its dense output back."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.core.spec import AdapterSpec, Targets
from lorakit.errors import SpecError
from lorakit.inits.loftq import LoftQ, loftq
from lorakit.inject.attach import adapters_named, attach
from lorakit.inject.evidence import gather
from lorakit.methods.lora import LoRA
from tests.inits.samples import quantise, rounded, started
from tests.law.cases import Net, weight_of
from tests.tolerances import assert_close


def halves(weight: Tensor) -> Tensor:
    """Return the nearest point of a grid that stays where it is."""
    return torch.round(2 * weight) / 2


def int4(weight: Tensor) -> Tensor:
    """Return the weight on 15 even steps, whose size follows the largest value of each block of 64."""
    blocks = weight.reshape(-1, 64)
    step = blocks.abs().amax(1, keepdim=True) / 7
    return (torch.round(blocks / step) * step).reshape(weight.shape)


def nf4(weight: Tensor) -> Tensor:
    """Return the weight after bitsandbytes' NF4."""
    functional: Any = pytest.importorskip("bitsandbytes.functional")
    packed, kept = functional.quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4")
    back: Tensor = functional.dequantize_4bit(packed, kept)
    return back


def errors(weight: Tensor, rank: int, round_trip: Any, most: int) -> list[float]:
    """Return |W - Q - B A| / |W - q(W)| after 0, 1, ..., `most` iterations."""
    found = []
    for t in range(most + 1):
        q, down, up = loftq(weight, rank, round_trip, t)
        found.append(float((weight - q - up @ down).norm() / (weight - round_trip(weight)).norm()))
    return found


def test_one_case_by_hand() -> None:
    # rounding diag(1.4, 0.2) leaves diag(0.4, 0.2); its best rank-1 part is diag(0.4, 0)
    q, down, up = loftq(torch.tensor([[1.4, 0.0], [0.0, 0.2]]), 1, torch.round, 1)
    assert_close(q, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert_close(up @ down, torch.tensor([[0.4, 0.0], [0.0, 0.0]]))
    assert_close(down.abs(), up.T.abs())


def test_no_iteration_is_qlora_s_start() -> None:
    weight = torch.randn(20, 30)
    q, down, up = loftq(weight, 4, rounded, 0)
    assert torch.equal(q, rounded(weight))
    assert not down.any()
    assert not up.any()


def test_the_error_never_rises_on_a_fixed_grid() -> None:
    found = errors(torch.randn(40, 60), 8, halves, 6)
    assert found[0] == 1.0
    assert all(b <= a + 1e-6 for a, b in pairwise(found)), found
    assert found[6] < found[1] < 0.85


@pytest.mark.parametrize("round_trip", [int4, nf4])
def test_the_error_falls_with_each_iteration(round_trip: Any) -> None:
    found = errors(torch.randn(128, 256), 16, round_trip, 5)
    assert all(b < a for a, b in pairwise(found)), found


def test_the_residual_is_what_the_rank_leaves() -> None:
    weight = torch.randn(20, 30)
    q, down, up = loftq(weight, 4, rounded, 3)
    spectrum = torch.linalg.svdvals(weight - q)
    assert_close(torch.linalg.svdvals(weight - q - up @ down)[:16], spectrum[4:], scale=float(spectrum[0]))


@pytest.mark.parametrize("alpha", [4.0, 8.0, 1.0])
def test_the_start_makes_up_for_the_rounding_at_any_scale(alpha: float) -> None:
    model, spec = Net(nn.Linear(30, 20)), AdapterSpec(LoRA(4, alpha, init_=LoftQ()), Targets("layer"))
    dense, evidence = weight_of(model).clone(), gather(model, spec)
    quantise(model)
    attach(model, spec, evidence=evidence)
    lost = torch.linalg.svdvals(dense - weight_of(model))
    left = torch.linalg.svdvals(dense - weight_of(model) - adapters_named(model, "default")[0].delta(weight_of(model)))
    assert_close(left[:16], lost[4:], scale=float(lost[0]))


def test_with_the_full_rank_a_quantised_layer_is_the_dense_one() -> None:
    model, spec = Net(nn.Linear(12, 8)), AdapterSpec(LoRA(8, 4.0, init_=LoftQ()), Targets("layer"))
    x, evidence = torch.randn(3, 12), gather(model, spec)
    y = model(x)
    quantise(model)
    assert not torch.allclose(model(x), y, atol=1e-2)
    attach(model, spec, evidence=evidence)
    assert_close(model(x), y)


def test_a_dense_base_is_refused() -> None:
    model, spec = Net(nn.Linear(12, 8)), AdapterSpec(LoRA(4, init_=LoftQ()), Targets("layer"))
    with pytest.raises(SpecError, match="loftq corrects a quantised base, and this weight is the dense one; quantise"):
        attach(model, spec, evidence=gather(model, spec))
    assert type(model.layer) is nn.Linear


def test_it_keeps_no_start() -> None:
    assert sorted(started("linear", "loftq")[1].tensors()) == ["down", "up"]


@pytest.mark.parametrize(("rank", "iterations", "told"), [(0, 1, "rank 0 must be"), (9, 1, r"= 8"), (2, -1, "from 0")])
def test_what_cannot_be_is_refused(rank: int, iterations: int, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        loftq(torch.randn(8, 12), rank, rounded, iterations)
