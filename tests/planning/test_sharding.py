"""Sharding: what is divided and what is not, against ZeRO's published numbers."""

from __future__ import annotations

import pytest

from lorakit.errors import SpecError
from lorakit.planning.memory import Parts, mixed_precision_parts
from lorakit.planning.sharding import per_device, traffic

STEP = Parts(
    weights=1000, adapters=100, gradients=40, optimizer=80, activations=500, logits=60, temporaries=7, overhead=9
)


def test_one_device_holds_everything_under_any_strategy() -> None:
    for strategy in ("single", "ddp", "fsdp", "zero3"):
        assert per_device(STEP, 1, strategy, layer=10, layer_gradients=5) == STEP
        assert traffic(STEP, 1, strategy) == 0


def test_ddp_holds_everything_and_the_gradients_once_more_in_buckets() -> None:
    assert per_device(STEP, 4, "ddp").temporaries == 7 + 40
    assert per_device(STEP, 4, "ddp").total == STEP.total + 40
    assert per_device(STEP, 4, "ddp", bucket_view=True) == STEP


def test_fsdp_divides_the_frozen_blocks_and_gathers_two() -> None:
    assert per_device(STEP, 4, "fsdp", layer=30, undivided=200) == Parts(
        weights=200 + 800 // 4,
        adapters=100,
        gradients=40,
        optimizer=80,
        activations=500,
        logits=60,
        temporaries=7 + 60 + 40,
        overhead=9,
    )


def test_zero3_divides_the_whole_state_and_gathers_two_layers() -> None:
    assert per_device(STEP, 4, "zero3", layer=30, layer_gradients=2, resident=0) == Parts(
        weights=250,
        adapters=25,
        gradients=10,
        optimizer=20,
        activations=500,
        logits=60,
        temporaries=7 + 60 + 4,
        overhead=9,
    )


def test_what_is_gathered_is_never_more_than_there_is() -> None:
    assert per_device(STEP, 4, "fsdp", layer=900, undivided=300).temporaries == 7 + 700 + 40
    assert per_device(STEP, 4, "zero3", resident=10**9).temporaries == 7 + 1100


def test_zero3_keeps_gathered_weights_up_to_a_number_of_parameters() -> None:
    assert per_device(STEP, 4, "zero3", layer=30, resident=300).temporaries == 7 + 300
    assert per_device(STEP, 4, "zero3", layer=30, resident=0).temporaries == 7 + 60


def test_shares_add_up_to_the_whole() -> None:
    shares = per_device(STEP, 3, "zero3")
    for name in ("weights", "adapters", "gradients", "optimizer"):
        assert 0 <= 3 * getattr(shares, name) - getattr(STEP, name) < 3


def test_zeros_own_example_is_reproduced() -> None:
    # arXiv 1910.02054, figure 1: 7.5B parameters on 64 devices, 120 GB replicated, 1.9 GB divided
    state = mixed_precision_parts(7_500_000_000)
    assert per_device(state, 64, "ddp", bucket_view=True).total / 1e9 == 120.0
    assert per_device(state, 64, "zero3", resident=0).total / 1e9 == pytest.approx(1.9, abs=0.05)


def test_traffic_of_full_training_is_two_and_three_times_the_parameters() -> None:
    # arXiv 1910.02054, section 7: 2 psi for data parallelism, 3 psi with divided parameters
    whole = Parts(weights=8000, gradients=8000, optimizer=32000)
    assert traffic(whole, 4, "ddp") == 2 * 8000 * 3 // 4
    assert traffic(whole, 4, "zero3") == 3 * 8000 * 3 // 4


def test_dividing_a_frozen_base_sends_far_more_than_ddp_does() -> None:
    # ddp sends an adapter's gradients only, fsdp what is divided of the base twice as well
    assert traffic(STEP, 2, "ddp") == 40
    assert traffic(STEP, 2, "fsdp", undivided=200) == (2 * 800 + 2 * 40) // 2
    assert traffic(STEP, 2, "zero3") == (2 * 1100 + 40) // 2


def test_impossible_lineups_say_what_to_change() -> None:
    with pytest.raises(SpecError, match="unknown strategy 'fsdp2'; did you mean 'fsdp'"):
        per_device(STEP, 2, "fsdp2")
    with pytest.raises(SpecError, match="'single' is one device, not 2; use 'ddp' or 'fsdp'"):
        per_device(STEP, 2, "single")
    with pytest.raises(SpecError, match="one device or more, not 0"):
        traffic(STEP, 0, "ddp")
