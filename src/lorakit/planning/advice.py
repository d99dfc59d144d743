"""Advice before a run: what lorakit would choose, why, on whose word, and where the recipe chose otherwise.

Arithmetic on plain numbers, so that it costs nothing and needs no model. Every line names its source, and a rule of
thumb is called one. What a rank can hold is a bound: about 2 bits a parameter against at most about 1 bit a trained
token (LoRA Without Regret), whatever the epochs, for a second pass brings nothing new.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lorakit.core.layerwise import PROFILES, uniform_rank
from lorakit.planning.rates import (
    ELSE,
    FULL_RATE,
    LORA_FACTOR,
    SHORT_FACTOR,
    SHORT_STEPS,
    fitted_family,
    published_rate,
)

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""The usual ranks; 256 kept up with full fine-tuning on data of the size of post-training (LoRA Without Regret)."""
RANK, ALPHA, SCALE, DROPOUT = 16, 32.0, 2.0, 0.0
BITS_A_PARAMETER, BITS_A_TOKEN = 2, 1
MOST_ROWS = 32
"""Rows a step from which LoRA is known to lose more than full fine-tuning does."""
GUIDE = ((1_000, 8), (10_000, 16), (100_000, 32))
MOST_EPOCHS = 3
MARKED = 3.0
"""A learning rate this many times off is said to differ."""

REGRET = "LoRA Without Regret, doi 10.64434/tml.20250929"
FIT = "tinker-cookbook, hyperparam_utils.py"
SWEEP = "tinker-cookbook, results/sft_sweep.md"
TRL = "TRL documentation, lora_without_regret"
LORA = "arXiv 2106.09685"


@dataclass(frozen=True)
class Advice:
    """One line: a topic, what lorakit would choose, the reason (with what the recipe does instead), and its source."""

    topic: str
    value: str
    reason: str
    source: str


@dataclass(frozen=True)
class Facts:
    """What advice depends on; None is unknown.

    `hidden` is the width of the model's stream, `family` its model_type, `per_rank` the parameters of one rank at the
    chosen targets (None for a method without ranks) and `everywhere` those at all linear layers but the head. `tokens`
    are the trained ones of the data, once; `classes` those of a classifier.
    """

    hidden: int | None
    family: str
    blocks: int
    per_rank: int | None = None
    everywhere: int | None = None
    rows: int | None = None
    tokens: int | None = None
    task: Literal["causal-lm", "classification"] = "causal-lm"
    classes: int | None = None

    @property
    def bits(self) -> float | None:
        """Return what the data can teach at most: a bit a trained token, or the label of each row."""
        if self.task == "classification":
            return None if self.rows is None else self.rows * math.log2(max(self.classes or 2, 2))
        return None if self.tokens is None else self.tokens * BITS_A_TOKEN


@dataclass(frozen=True)
class Choice:
    """What a recipe says; None where it leaves the choice open. `batch` counts rows an optimizer step."""

    rank: int | None = None
    alpha: float | None = None
    stabilised: bool = False
    targets: tuple[str, ...] | None = None
    lr: float | None = None
    dropout: float | None = None
    batch: int | None = None
    epochs: float | None = None
    steps: int | None = None
    layerwise: str | None = None
    full: bool = False
    """Whether the whole base is trained, and no adapter."""


def advise(facts: Facts, choice: Choice = Choice()) -> tuple[Advice, ...]:
    """Return the advice for a run, a line for each topic; those about ranks only where the method has any."""
    return tuple(_lines(facts, choice))


def holds(rank: float, per_rank: int) -> int:
    """Return how many trained tokens a rank can hold: 2 bits for each of its parameters, 1 bit a token."""
    return round(rank * per_rank) * BITS_A_PARAMETER // BITS_A_TOKEN


def rank_for(bits: float, per_rank: int) -> int | None:
    """Return the smallest usual rank whose parameters hold so many bits, or None where 256 does not."""
    return next((rank for rank in RANKS if rank * per_rank * BITS_A_PARAMETER >= bits), None)


def matched_rank(preset: str, blocks: int) -> tuple[float, int]:
    """Return the mean rank of a layer-wise preset, and the whole uniform rank nearest to it in parameters."""
    mean = uniform_rank(PROFILES[preset].by_layer(blocks))
    return mean, max(1, round(mean))


def _lines(facts: Facts, choice: Choice) -> Iterator[Advice]:
    if facts.per_rank is not None:
        yield _rank(facts, choice, facts.per_rank)
        if facts.rows is not None:
            yield _rank_by_rows(facts.rows)
        yield _alpha(choice)
    if not choice.full:
        yield _targets(facts, choice)
    yield _rate(facts, choice)
    if not choice.full:
        yield _dropout(choice)
    yield _batch(choice)
    yield _epochs(facts, choice)
    if facts.per_rank is not None:
        yield _layerwise(facts, choice, facts.per_rank)


def _rank(facts: Facts, choice: Choice, per_rank: int) -> Advice:
    bits, what = facts.bits, "tokens" if facts.task == "causal-lm" else "bits of labels"
    needed = None if bits is None else rank_for(bits, per_rank)
    if bits is None:
        value = str(RANK)
        reason = f"the data are not known; rank {RANK} holds about {_count(holds(RANK, per_rank))} trained tokens"
    elif needed is None:
        value = str(RANKS[-1])
        reason = (
            f"the data hold up to {_count(bits)} {what}, rank {value} about {_count(holds(RANKS[-1], per_rank))}: "
            "beyond it LoRA learns less from each step than full fine-tuning; adapt more layers, or train whole"
        )
    else:
        value = f"{needed} or more"
        reason = (
            f"the smallest usual rank that holds the data: up to {_count(bits)} {what} against about "
            f"{_count(holds(needed, per_rank))}"
        )
    return Advice("rank", value, reason + _held(facts, choice, per_rank, needed), REGRET)


def _held(facts: Facts, choice: Choice, per_rank: int, needed: int | None) -> str:
    """Return what the recipe's own rank holds, or lorakit's where the recipe names none."""
    if choice.layerwise is not None:
        rank = matched_rank(choice.layerwise, facts.blocks)[0]
        called = f"the recipe's rank {rank:.4g} on average"
    elif choice.rank is not None:
        rank, called = float(choice.rank), f"the recipe's rank {choice.rank}"
    else:
        rank, called = float(RANK), f"lorakit's default {RANK}"
    held = _count(holds(rank, per_rank))
    if facts.bits is None:
        return "" if rank == RANK else f", {called} {held}"
    if holds(rank, per_rank) < facts.bits:
        return f"; {called} holds only {held}"
    if needed is not None and rank > 8 * max(needed, RANK):
        return (
            f"; {called} holds {held}, which costs memory and gains little: from rank 4 to 128 the best loss of "
            f"Llama-3.1-8B fell by 0.009 ({SWEEP})"
        )
    return f"; {called} holds {held}"


def _rank_by_rows(rows: int) -> Advice:
    value = next((rank for most, rank in GUIDE if rows <= most), 64)
    steps = ", ".join(f"{rank} up to {most:,}" for most, rank in GUIDE)
    return Advice(
        "rank by rows",
        str(value),
        f"what guides say for {rows:,} rows ({steps}, 64 above); rows say nothing of their length, so what the rank "
        "holds is the better ground",
        "a rule of thumb, no measurement",
    )


def _alpha(choice: Choice) -> Advice:
    rank, alpha = choice.rank or RANK, ALPHA if choice.alpha is None else choice.alpha
    divisor = math.sqrt(rank) if choice.stabilised else rank
    formula = "alpha / sqrt(rank)" if choice.stabilised else "alpha / rank"
    reason = (
        f"a scale of {SCALE:g} = {formula} at every rank, so that layers of other ranks count alike; LoRA Without "
        f"Regret fitted its rate with alpha {ALPHA:g} at every rank, which is the same at rank {RANK}"
    )
    scale = alpha / divisor
    if not SCALE / 2 < scale < 2 * SCALE:
        given = f"left open it stays {ALPHA:g}" if choice.alpha is None else f"the recipe's alpha is {alpha:g}"
        own = alpha == ALPHA and not choice.stabilised
        told = "the one the published rate was fitted with" if own else "search the rate anew there"
        reason += f"; {given}, a scale of {scale:.3g}: {told}"
    return Advice("alpha", f"{SCALE * divisor:.4g}", reason, f"guides (twice the rank); {REGRET}")


def _targets(facts: Facts, choice: Choice) -> Advice:
    reason = "the MLP matters most, and attention alone loses even with as many parameters"
    all_of = facts.everywhere
    if all_of is not None and facts.per_rank is not None:
        narrow, share = facts.per_rank < all_of, f" hold {facts.per_rank / all_of:.0%} of the parameters of a rank"
    else:
        narrow, share = choice.targets is not None and "all-linear" not in choice.targets, " are fewer"
    if narrow:
        named = ", ".join(choice.targets) if choice.targets else "the chosen layers"
        reason += f"; {named}{share}"
    return Advice("targets", "all-linear", reason, REGRET)


def _rate(facts: Facts, choice: Choice) -> Advice:
    rate = published_rate(facts.family, facts.hidden)
    family = None if facts.hidden is None else fitted_family(facts.family)
    if choice.full:
        reason = f"a tenth of {_plain(rate)}, which is LoRA's: its best rate is about 10 times that of full fine-tuning"
        return Advice("learning rate", _plain(rate / LORA_FACTOR), reason, REGRET)
    if family is None:
        source = SWEEP
        reason = (
            f"no fit is published for {facts.family}, so a middle value of the field; try 1e-4 and 5e-4 beside it "
            "(the best of a sweep over 27 models was 3e-4 for 14 and 1e-3 for 10)"
        )
        assert rate == ELSE
    else:
        source = f"{REGRET}; {FIT}"
        reason = (
            f"5e-5 x 10 x (2000 / {facts.hidden})^p, the fit for {family}: about 10 times the rate of full "
            "fine-tuning, at any rank"
        )
    if facts.task == "classification":
        reason += "; it was found on language modelling, not on classifiers"
    steps = _steps(facts, choice)
    if steps is not None and steps < SHORT_STEPS:
        short = rate * SHORT_FACTOR / LORA_FACTOR
        reason += (
            f"; in runs of fewer than about {SHORT_STEPS} steps the best rate was nearer 15 times that of full "
            f"fine-tuning, and this one has {steps}: {_plain(short)}"
        )
    if choice.lr is not None and choice.lr * MARKED <= rate:
        reason += (
            f"; the recipe's {_plain(choice.lr)} is {rate / choice.lr:.3g} times lower: a rate 7.5 times too low cost "
            f"Llama-3.1-8B 0.020 to 0.028 of loss, two to three times what rank 128 gains over rank 4 ({SWEEP})"
            + ("; rates of that size are those of full fine-tuning" if choice.lr <= FULL_RATE else "")
        )
    elif choice.lr is not None and choice.lr >= rate * MARKED:
        reason += (
            f"; the recipe's {_plain(choice.lr)} is {choice.lr / rate:.3g} times higher: of 80 runs that diverged 72 "
            f"were at 3e-3 ({SWEEP})"
        )
    return Advice("learning rate", _plain(rate), reason, source)


def _dropout(choice: Choice) -> Advice:
    reason = "every adapted layer makes its mask twice a step; one that is not fused keeps it, and a copy of its input"
    if choice.dropout:
        reason += f"; the recipe drops {choice.dropout:.0%}: let a validation set show that it helps"
    return Advice("dropout", f"{DROPOUT:g}", reason, "defaults of torchtune and Unsloth; docs/recipe.md")


def _batch(choice: Choice) -> Advice:
    reason = "large batches cost LoRA more loss than full fine-tuning, and a higher rank does not mend it"
    if choice.batch is not None and choice.batch >= MOST_ROWS:
        reason += f"; the recipe takes {choice.batch} rows a step"
    return Advice("batch", f"under {MOST_ROWS} rows a step", reason, f"{REGRET}; {TRL}")


def _epochs(facts: Facts, choice: Choice) -> Advice:
    if facts.task == "classification":
        reason = "with a validation set, which keeps the best: LoRA's authors took 25 to 80 on GLUE, and its best epoch"
        return Advice("epochs", "until the validation loss rises", reason, f"{LORA}, appendix D")
    reason = "a rule of thumb: more than three usually learn the rows by heart; a validation set keeps the best"
    if choice.epochs is not None and choice.epochs > MOST_EPOCHS:
        reason += f"; the recipe takes {choice.epochs:g}"
    return Advice("epochs", "1 to 3", reason, "guides of Hugging Face and Unsloth")


def _layerwise(facts: Facts, choice: Choice, per_rank: int) -> Advice:
    if choice.layerwise is not None:
        mean, uniform = matched_rank(choice.layerwise, facts.blocks)
        reason = (
            f"the preset {choice.layerwise} has rank {mean:.4g} on average over {facts.blocks} blocks, "
            f"{_count(mean * per_rank)} parameters; rank {uniform} everywhere has {_count(uniform * per_rank)}, and a "
            "comparison against that alone shows what the bands do"
        )
        return Advice("layer-wise", f"rank {uniform} everywhere, to compare", reason, "a preset without a citation")
    matched = ", ".join(f"{name} as many as rank {matched_rank(name, facts.blocks)[1]}" for name in PROFILES)
    reason = f"no measurement supports bands of ranks; the presets cost parameters like a uniform rank: {matched}"
    return Advice("layer-wise", "one rank everywhere", reason, "presets without a citation")


def _steps(facts: Facts, choice: Choice) -> int | None:
    """Return the optimizer steps of the run, or None where they are not known before packing."""
    if choice.steps is not None:
        return choice.steps
    if facts.rows is None or choice.batch is None:
        return None
    return math.ceil(math.ceil(facts.rows / choice.batch) * (1.0 if choice.epochs is None else choice.epochs))


def _count(n: float) -> str:
    if n >= 1e9:
        return f"{n / 1e9:.3g} billion"
    return f"{n / 1e6:.3g} million" if n >= 1e6 else f"{math.ceil(n):,}"


def _plain(rate: float) -> str:
    """Return a rate as recipes write it: 2.86e-4."""
    mantissa, _, exponent = f"{rate:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
