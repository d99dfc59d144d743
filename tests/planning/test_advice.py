"""Advice, against numbers worked out by hand and the sources' own figures.

LLaMA-2-7B, width 4096, 32 blocks: one rank at all seven linear layers has 4 * 8192 + 3 * (4096 + 11008) = 78,080
parameters a block, 2,498,560 in all; at q and v 2 * 8192 a block, 524,288 in all.
"""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

from lorakit.planning.advice import Advice, Choice, Facts, advise, holds, matched_rank, rank_for
from lorakit.planning.rates import fitted_family, published_rate

ALL, QV = 2_498_560, 524_288
LLAMA = Facts(4096, "llama", 32, ALL, ALL)


def line(topic: str, facts: Facts = LLAMA, **choice: object) -> Advice:
    """Return the one line about a topic."""
    (found,) = [a for a in advise(facts, Choice(**choice)) if a.topic == topic]  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(
    ("family", "hidden", "rate"),
    [
        ("llama", 4096, 2.857e-4),  # 5e-4 * exp(.781 * ln(2000 / 4096)) = 5e-4 * exp(-.55985)
        ("qwen3", 4096, 4.730e-4),  # 5e-4 * exp(.0775 * -.71684) = 5e-4 * .94596
        ("llama", 2048, 4.908e-4),  # Llama-3.2-1B
        ("gpt2", 768, 2e-4),
        ("mistral", 4096, 2e-4),  # a Llama in shape, but not in the fit
    ],
)
def test_the_rate_is_the_published_one_and_2e_4_where_none_is(family: str, hidden: int, rate: float) -> None:
    assert published_rate(family, hidden) == pytest.approx(rate, rel=5e-4)


def test_the_rate_says_whether_it_is_a_fit() -> None:
    fitted, other = line("learning rate"), line("learning rate", replace(LLAMA, family="gpt2"))
    assert (fitted.value, other.value) == ("2.86e-4", "2e-4")
    assert "hyperparam_utils" in fitted.source
    assert "no fit is published for gpt2" in other.reason
    assert fitted_family("qwen2_moe") == "qwen"
    assert fitted_family("opt") is None


def test_rank_16_everywhere_on_7b_holds_80_million_tokens_and_q_v_at_rank_8_8_million() -> None:
    assert holds(16, ALL) == 79_953_920  # 39,976,960 parameters, 2 bits each
    assert holds(8, QV) == 8_388_608  # 4,194,304 parameters


@pytest.mark.parametrize(
    ("tokens", "rank"),
    [
        (1, 1),
        (2 * QV, 1),  # exactly what rank 1 holds
        (2 * QV + 1, 2),
        (8_388_608, 8),
        (9_000_000, 16),
        (2 * 256 * QV, 256),
        (2 * 256 * QV + 1, None),
    ],
)
def test_the_rank_is_the_smallest_usual_one_that_holds_the_data(tokens: int, rank: int | None) -> None:
    assert rank_for(tokens, QV) == rank


def test_a_rank_that_holds_the_data_is_kept_and_one_that_does_not_is_named() -> None:
    facts = replace(LLAMA, per_rank=QV, tokens=9_000_000)
    assert line("rank", facts).value == "16 or more"
    small, fits, vast = (line("rank", facts, rank=r).reason for r in (8, 16, 256))
    assert "the recipe's rank 8 holds only 8.39 million" in small
    assert "the recipe's rank 16 holds 16.8 million" in fits
    assert "only" not in fits
    assert "gains little" in vast
    assert "lorakit's default 16 holds 16.8 million" in line("rank", facts).reason


def test_data_that_no_rank_holds_are_said_to_be_too_many() -> None:
    found = line("rank", replace(LLAMA, per_rank=QV, tokens=300_000_000))
    assert found.value == "256"
    assert "rank 256 about 268 million" in found.reason
    assert "adapt more layers" in found.reason


def test_without_data_the_default_is_given_with_what_it_holds() -> None:
    found = line("rank", rank=4)
    assert found.value == "16"
    assert "rank 16 holds about 80 million trained tokens, the recipe's rank 4 20 million" in found.reason


def test_a_classifier_learns_labels_not_tokens() -> None:
    facts = Facts(768, "roberta", 12, 1000, None, rows=6000, tokens=10**9, task="classification", classes=4)
    assert facts.bits == 12_000
    assert line("rank", facts).value == "8 or more"  # 8 * 1000 * 2 = 16,000, rank 4 holds 8,000
    assert replace(facts, rows=None).bits is None
    assert "classifiers" in line("learning rate", facts).reason
    assert "GLUE" in line("epochs", facts).reason


@pytest.mark.parametrize(("rows", "rank"), [(500, "8"), (1000, "8"), (1001, "16"), (100_000, "32"), (100_001, "64")])
def test_what_guides_say_of_rows_is_called_a_rule_of_thumb(rows: int, rank: str) -> None:
    found = line("rank by rows", replace(LLAMA, rows=rows))
    assert found.value == rank
    assert "rule of thumb" in found.source
    assert "rank by rows" not in {a.topic for a in advise(LLAMA)}


def test_alpha_keeps_its_scale_when_the_rank_changes() -> None:
    assert [line("alpha", rank=r).value for r in (None, 8, 64)] == ["32", "16", "128"]
    assert line("alpha", rank=64, stabilised=True).value == "16"  # 2 * sqrt(64)
    assert "the recipe's" not in line("alpha", rank=8, alpha=16.0).reason
    assert "alpha is 32, a scale of 4: the one the published" in line("alpha", rank=8, alpha=32.0).reason
    assert "alpha is 16, a scale of 0.25: search the rate anew" in line("alpha", rank=64, alpha=16.0).reason
    assert "left open it stays 32, a scale of 0.5" in line("alpha", rank=64).reason


def test_narrow_targets_are_measured_against_all_linear_layers() -> None:
    assert "hold" not in line("targets").reason
    narrow = line("targets", replace(LLAMA, per_rank=QV), targets=("q_proj", "v_proj"))
    assert narrow.value == "all-linear"
    assert "q_proj, v_proj hold 21% of the parameters" in narrow.reason  # 524,288 / 2,498,560
    unknown = replace(LLAMA, everywhere=None)
    assert "q_proj are fewer" in line("targets", unknown, targets=("q_proj",)).reason
    assert "fewer" not in line("targets", unknown, targets=("all-linear",)).reason


def test_a_rate_three_times_off_is_named() -> None:
    assert "the recipe" not in line("learning rate", lr=1e-4).reason
    assert "2e-5 is 14.3 times lower" in line("learning rate", lr=2e-5).reason  # 2.857e-4 / 2e-5
    assert "3e-3 is 10.5 times higher" in line("learning rate", lr=3e-3).reason


def test_a_short_run_may_take_15_times_the_full_rate() -> None:
    short = line("learning rate", steps=60)
    assert short.value == "2.86e-4"
    assert "this one has 60: 4.28e-4" in short.reason  # 1.5 * 2.8565e-4
    assert "fewer than about" not in line("learning rate", steps=100).reason
    counted = line("learning rate", replace(LLAMA, rows=330), batch=8, epochs=2)  # ceil(330 / 8) * 2 = 84
    assert "this one has 84" in counted.reason
    assert "fewer than about" not in line("learning rate", replace(LLAMA, rows=330)).reason


def test_large_batches_dropout_and_many_epochs_are_named() -> None:
    assert "32 rows a step" in line("batch", batch=32).reason
    assert "the recipe" not in line("batch", batch=31).reason
    assert line("dropout", dropout=0.05).value == "0"
    assert "drops 5%" in line("dropout", dropout=0.05).reason
    assert "the recipe" not in line("dropout", dropout=0.0).reason
    assert "takes 5" in line("epochs", epochs=5).reason
    assert "the recipe" not in line("epochs", epochs=3).reason


@pytest.mark.parametrize(
    ("preset", "mean", "rank"), [("low", 10.375, 10), ("middle", 22.5625, 23), ("high", 34.75, 35)]
)
def test_a_preset_has_its_uniform_rank_of_the_same_size(preset: str, mean: float, rank: int) -> None:
    assert matched_rank(preset, 32) == (mean, rank)  # middle: (6 * 3 + 12 * 12 + 14 * 40) / 32


def test_the_presets_of_7b_have_25_9_and_86_8_million_parameters() -> None:
    low, high = (line("layer-wise", layerwise=name) for name in ("low", "high"))
    assert low.value == "rank 10 everywhere, to compare"
    assert "25.9 million parameters; rank 10 everywhere has 25 million" in low.reason  # 10.375 and 10 * 2,498,560
    assert "86.8 million parameters; rank 35 everywhere has 87.4 million" in high.reason
    assert "citation" in low.source
    assert "low as many as rank 10, middle as many as rank 23, high as many as rank 35" in line("layer-wise").reason
    held = line("rank", replace(LLAMA, tokens=60_000_000), rank=16, layerwise="low").reason
    assert "rank 10.38 on average holds only 51.8 million" in held  # 10.375 * 2,498,560 * 2


def test_a_method_without_ranks_gets_no_advice_on_them() -> None:
    topics = {a.topic for a in advise(replace(LLAMA, per_rank=None, rows=10))}
    assert topics == {"targets", "learning rate", "dropout", "batch", "epochs"}


def test_every_line_has_a_reason_and_a_source_and_stays_as_it_is() -> None:
    found = advise(replace(LLAMA, rows=10, tokens=1000))
    assert len(found) == 9
    assert all(a.topic and a.value and a.reason and a.source for a in found)
    with pytest.raises(FrozenInstanceError):
        found[0].value = "1"  # type: ignore[misc]
