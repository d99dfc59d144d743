"""A prompt that stands once for all its answers: the same losses, gradients and counts as in rows of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from lorakit.data import Collator, PackRule, prepare
from lorakit.data.packing import example_lengths
from lorakit.errors import RecipeError
from lorakit.training.events import read_events
from lorakit.training.loss import logits_of, mean_loss, summed_loss, trained_labels
from lorakit.training.run import Run, train
from lorakit.training.stage import build_stage
from tests.data.samples import PAD, model, tokenizer
from tests.data.test_isolation import FAMILIES
from tests.training.samples import pairs, recipe_of, write_rows

ROWS = [{"prompt": p, "completion": c} for p, count in (("cabc", 4), ("bc", 3), ("cc", 1)) for c in "abcc"[:count]]
RULE = PackRule(24, share=-1.0)


def packed() -> Dataset:
    """Two rows: a group of four, and a group of three beside an example of its own prompt."""
    made = prepare(ROWS, tokenizer(), max_length=24, packing=RULE)
    assert made.report.tokens_shared == 3 * 3 + 2 * 2
    return made.dataset


def gradients(network: Any, rows: Dataset, size: int) -> tuple[float, int, torch.Tensor]:
    """The summed loss, the trained tokens and the gradient of every weight, rows taken `size` at a time."""
    network.zero_grad()
    total, count = 0.0, 0
    for start in range(0, len(rows), size):
        batch = Collator(PAD)([rows[i] for i in range(start, min(start + size, len(rows)))])
        labels = batch.pop("labels")
        loss, trained = summed_loss(logits_of(network, batch, labels), labels)
        loss.backward()
        total, count = total + float(loss.detach()), count + int(trained)
        assert trained == trained_labels(labels)
    return total, count, torch.cat([p.grad.float().flatten() for p in network.parameters() if p.grad is not None])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_those_of_separate_rows(family: str, attention: str) -> None:
    network = model(family, attention)
    alone = gradients(network, prepare(ROWS, tokenizer(), max_length=24).dataset, 1)
    shared = gradients(network, packed(), 2)
    assert shared[1] == alone[1]
    assert shared[0] == pytest.approx(alone[0], rel=1e-6)
    assert (shared[2] - alone[2]).norm() < 1e-6 * alone[2].norm()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_in_16_bits_gradients_differ_by_rounding(attention: str) -> None:
    network = model("llama", attention).to(torch.bfloat16)
    alone = gradients(network, prepare(ROWS, tokenizer(), max_length=24).dataset, 1)[2]
    shared = gradients(network, packed(), 2)[2]
    assert (shared - alone).norm() < 4 * torch.finfo(torch.bfloat16).eps * alone.norm()


def test_a_branch_does_not_move_when_its_siblings_change() -> None:
    network = model("llama", "sdpa")
    row = max(packed(), key=lambda row: max(row["branches"]))
    batch = Collator(PAD)([row])
    other = {**batch, "input_ids": torch.where(batch["branches"] == 2, 200, batch["input_ids"])}
    with torch.no_grad():
        here, there = (logits_of(network, b, b.pop("labels")) for b in (dict(batch), dict(other)))
    moved = (here != there).any(-1)
    assert torch.equal(moved, batch["branches"] == 2)


def test_a_mean_over_packed_rows_is_that_over_separate_ones() -> None:
    network = model("llama", "sdpa")
    loss, count = mean_loss(network, packed(), 2, PAD)
    alone = mean_loss(network, prepare(ROWS, tokenizer(), max_length=24).dataset, 3, PAD)
    assert (loss, count) == (pytest.approx(alone[0], rel=1e-6), alone[1])


def run_in(base: Path, folder: Path, **changes: Any) -> tuple[Run, list[dict[str, Any]]]:
    folder.mkdir(exist_ok=True)
    rows = [
        {"prompt": f"{row['prompt']} a cab", "completion": c} for row in pairs(12) for c in (" bed", " face", " ace")
    ]
    given = {"data__train": write_rows(folder / "t.jsonl", rows), "train__batch_size": None, **changes}
    run = train(recipe_of(base, folder, data__validation=write_rows(folder / "v.jsonl", rows[:9]), **given))
    return run, [dict(event) for event in read_events(folder / "run" / "events.jsonl")]


def test_a_run_that_shares_prompts_learns_the_same_and_says_what_it_saves(base: Path, tmp_path: Path) -> None:
    once = {"train__batch_tokens": 100_000, "data__max_length": 128, "train__epochs": 3}
    shared, events = run_in(base, tmp_path / "a", **once)
    plain, _ = run_in(base, tmp_path / "b", data__share_prompts="never", **once)
    (why,) = [event["why"] for event in events if event["event"] == "plan"]
    assert "shared prompts save" in why
    for part in ("train", "validation"):
        ours, theirs = shared.data[part], plain.data[part]
        assert ours["tokens_shared"] > 0.2 * ours["tokens"]
        assert ours["trained_tokens"] == theirs["trained_tokens"]
        assert theirs["tokens_shared"] == 0
    assert shared.steps == plain.steps == 3
    assert shared.trained_tokens == plain.trained_tokens
    assert shared.tokens < 0.8 * plain.tokens
    assert shared.train_loss == pytest.approx(plain.train_loss, rel=1e-5)  # fp32, over three steps of AdamW
    assert shared.validation_loss == pytest.approx(plain.validation_loss, rel=1e-5)


def test_validation_rows_are_as_long_as_the_training_s(base: Path, tmp_path: Path) -> None:
    run, _ = run_in(base, tmp_path, train__batch_tokens=128)
    assert run.data["validation"]["row_length"] == run.data["train"]["row_length"]


def test_a_stage_counts_each_example_once(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(base, tmp_path, train__batch_size=None, train__batch_tokens=128, data__share_prompts="always")
    stage = build_stage(recipe)
    lengths = example_lengths(stage.train.dataset)
    assert (len(lengths), sum(lengths)) == (stage.train.report.kept, stage.train.report.tokens)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "needs packed rows, and there are none: train.batch_size counts examples"),
        ({"train__batch_size": None, "data__loss": "all"}, "not possible here: data.loss: all trains them"),
    ],
)
def test_always_is_refused_where_prompts_cannot_be_shared(
    base: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RecipeError, match=reason):
        build_stage(recipe_of(base, tmp_path, data__share_prompts="always", **changes))


def test_prompts_that_are_trained_too_are_left_apart_and_that_is_said(base: Path, tmp_path: Path) -> None:
    stage = build_stage(recipe_of(base, tmp_path, train__batch_size=None, data__loss="all"))
    assert stage.packed
    assert stage.why.endswith("prompts are not shared: data.loss: all trains them, each as often")
