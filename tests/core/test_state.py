"""An adapter as a value: trimming leaves out what no longer acts, and changes nothing else."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lorakit
from lorakit import AdapterSpec, LoRA, Targets, attach, detach, state, trim
from lorakit.core.spec import Override
from lorakit.core.state import Base, all_finite
from lorakit.inject.attach import adapters_named
from lorakit.methods.adalora import AdaLoRA
from lorakit.methods.adaptive import Adaptive
from tests.law.cases import jitter
from tests.tolerances import assert_close


def adapted(spec: AdapterSpec) -> nn.Module:
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 12))
    attach(model, spec)
    for adapter in adapters_named(model, "default"):
        jitter(adapter)
    return model


def test_a_trimmed_adalora_acts_the_same_attached_again_and_saved(tmp_path: Path) -> None:
    model, x = adapted(AdapterSpec(AdaLoRA(2, 6), Targets(["0", "2", "4"]))), torch.randn(5, 12)
    with torch.no_grad():
        for adapter, dead in zip(adapters_named(model, "default"), ([1, 4], range(6), []), strict=True):
            adapter.get_parameter("gain")[list(dead)] = 0.0
    y, whole = model(x), state(model)
    small = trim(whole)
    assert [(u.site.path, len(u.tensors["gain"])) for u in small.updates] == [("0", 4), ("4", 6)]
    assert small.parameters == 4 * 23 + 6 * 29 < whole.parameters
    assert small.spec == whole.spec
    lorakit.save(small, tmp_path / "small", "native")
    for again in (small, lorakit.load(tmp_path / "small")):
        detach(model)
        attach(model, again)
        assert_close(model(x), y)
    assert trim(small).updates[0].method == small.updates[0].method, "there is nothing more to trim"


def test_a_trimmed_adaptive_lora_is_a_plain_one_that_peft_s_format_takes(tmp_path: Path) -> None:
    spec = AdapterSpec(Adaptive(4, high=8, alpha=8.0), Targets(["0", "2"]))
    model, x = adapted(spec), torch.randn(5, 12)
    with torch.no_grad():
        adapters_named(model, "default")[0].get_buffer("gate")[2:] = 0.0
    y, small = model(x), trim(state(model))
    assert [u.method for u in small.updates] == [LoRA(2, 4.0), LoRA(4, 8.0)]
    lorakit.save(small, tmp_path / "small", "peft")
    detach(model)
    attach(model, lorakit.load(tmp_path / "small"))
    assert_close(model(x), y)


def test_other_methods_are_left_as_they_are() -> None:
    whole = state(adapted(AdapterSpec(LoRA(4), Targets(["0", "2"]), overrides=[Override.of("2", rank=2)])))
    assert trim(whole).updates == whole.updates


def test_an_adapter_that_does_nothing_yet_has_nothing_left() -> None:
    model = nn.Sequential(nn.Linear(12, 10))
    attach(model, AdapterSpec(AdaLoRA(2, 6), Targets("0")))
    assert trim(state(model)).updates == ()


def test_bases_are_told_apart_by_the_weights_both_remember() -> None:
    here = Base("here", {"a": (1.0, -0.5), "b": (3.0,)})
    assert here.unlike(Base(None, {"a": (1.015, -0.49), "c": (9.0,)})) == []  # 2 % of the largest: rounding
    assert here.unlike(Base("here", {"b": (3.1,), "a": (1.0, -0.55)})) == ["a", "b"]
    assert here.unlike(Base("here", {"a": (1.0,)})) == ["a"], "of another number of weights"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_one_odd_value_among_many_tensors_is_seen(dtype: torch.dtype, odd: float) -> None:
    tensors = [torch.randn(5, 3).to(dtype) for _ in range(4)] + [torch.zeros(0), torch.arange(3)]
    assert all_finite(tensors)
    tensors[2][4, 1] = odd
    assert not all_finite(tensors)
    tensors[1][0, 0] = -odd  # and none hides another
    assert not all_finite(tensors)


def test_a_norm_that_overflows_is_not_taken_for_an_odd_value() -> None:
    assert all_finite([torch.full((4,), 3e38), torch.full((4,), 1e308, dtype=torch.float64)])


CALLS = """
from torch import nn
import lorakit
from lorakit.combining import average_factors, combine, compress, difference

for call in (
    lambda given: lorakit.attach(nn.Linear(8, 8), given), lorakit.inspect, lorakit.spectrum,
    lambda given: lorakit.save(given, "nowhere"), lambda given: combine([given]),
    lambda given: average_factors([given]), lambda given: compress(given, rank=1),
    lambda given: difference(given, given),
):
    for given in ("runs/a", {}):
        try:
            call(given)
        except lorakit.LorakitError as told:
            print(told)
"""


def test_a_path_instead_of_an_adapter_is_answered_with_how_to_read_it() -> None:
    told = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True, check=True).stdout
    path = "an adapter is needed here, not 'runs/a'; read it first: lorakit.load('runs/a')"
    other = "an adapter is needed here, not a dict; lorakit.load and lorakit.state return one"
    assert told.splitlines() == [path, other] * 8  # in a process of its own: here the types are checked before
