"""The order of the rows: every row once, decided by seed and epoch, and rows of one length together where asked."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.data.packing import row_lengths
from lorakit.training.order import Shuffled, row_order
from lorakit.training.run import train
from lorakit.training.stage import build_stage
from tests.training.samples import recipe_of, write_rows

LENGTHS = random.Random(0).choices(range(5, 81), k=1003)


def steps(order: list[int], size: int = 8) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def padded(order: list[int], size: int = 8) -> int:
    return sum(len(step) * max(LENGTHS[i] for i in step) for step in steps(order, size))


@pytest.mark.parametrize("grouped", [False, True])
def test_every_row_is_visited_once_in_an_order_of_seed_and_epoch_alone(grouped: bool) -> None:
    order = Shuffled(LENGTHS, 3, 8, grouped=grouped)
    first = list(order)
    assert sorted(first) == list(range(1003))
    assert len(order) == 1003
    assert first == list(order) == list(Shuffled(LENGTHS, 3, 8, grouped=grouped))
    order.set_epoch(1)
    assert list(order) != first
    assert list(order) == list(order)
    again = Shuffled(LENGTHS, 3, 8, grouped=grouped)
    again.set_epoch(1)
    assert list(again) == list(order)


def test_the_first_step_of_a_run_visits_the_longest_rows_the_longest_first() -> None:
    for grouped in (False, True):
        order = Shuffled(LENGTHS, 3, 8, grouped=grouped)
        assert [LENGTHS[i] for i in list(order)[:8]] == sorted(LENGTHS, reverse=True)[:8]
        order.set_epoch(1)
        assert [LENGTHS[i] for i in list(order)[:8]] != sorted(LENGTHS, reverse=True)[:8]


def test_rows_of_one_length_come_in_the_order_of_the_seed() -> None:
    shuffled = torch.randperm(1003, generator=torch.Generator().manual_seed(3)).tolist()
    assert list(Shuffled([7] * 1003, 3, 8)) == shuffled
    longest = [i for i in shuffled if LENGTHS[i] == max(LENGTHS)]
    others = [i for i in shuffled if i not in longest]
    assert list(Shuffled(LENGTHS, 3, len(longest))) == longest + others  # of the others none is moved


def test_rows_of_one_length_make_a_step_and_leave_almost_no_padding() -> None:
    plain, grouped = list(Shuffled(LENGTHS, 0, 8)), list(Shuffled(LENGTHS, 0, 8, grouped=True))
    assert padded(plain) > 1.6 * sum(LENGTHS)
    assert padded(grouped) < 1.05 * sum(LENGTHS)
    means = [sum(LENGTHS[i] for i in step) / 8 for step in steps(grouped)[:-1]]
    sign_changes = sum((a < b) != (b < c) for a, b, c in zip(means, means[1:], means[2:], strict=False))
    assert sign_changes > len(means) / 2  # long and short steps follow each other at random, not from long to short


def test_the_rows_that_fill_no_step_come_last() -> None:
    assert list(Shuffled(LENGTHS, 0, 8, grouped=True))[-3:] == list(Shuffled(LENGTHS, 0, 8))[-3:]


LABELLED = [{"text": " ".join(["ace", "bad", "cab"][i % 3 :][:1] * (1 + i % 7)), "label": i % 2} for i in range(48)]


def labelled(base: Path, folder: Path, **changes: Any) -> Any:
    folder.mkdir(exist_ok=True)
    data = write_rows(folder / "rows.jsonl", LABELLED)
    return recipe_of(base, folder, data__train=data, **changes)


def test_classifiers_are_grouped_unless_told_otherwise_and_language_models_if_told(base: Path, tmp_path: Path) -> None:
    def grouped(recipe: Any) -> bool:
        stage = build_stage(recipe)
        return list(row_order(recipe, stage)) != list(
            Shuffled(row_lengths(stage.train.dataset), recipe.train.seed, stage.batch_rows)
        )

    assert grouped(labelled(base, tmp_path))
    assert not grouped(labelled(base, tmp_path, train__group_by_length=False))
    assert not grouped(recipe_of(base, tmp_path))
    assert grouped(recipe_of(base, tmp_path, train__group_by_length=True))


def test_16_rows_a_step_are_the_same_rows_as_two_of_8(base: Path, tmp_path: Path) -> None:
    whole = labelled(base, tmp_path, train__batch_size=16)
    halves = labelled(base, tmp_path, train__batch_size=8, train__accumulation=2)
    orders = [list(row_order(recipe, build_stage(recipe))) for recipe in (whole, halves)]
    assert orders[0] == orders[1]


def test_the_grouping_changes_the_order_and_not_what_is_learned_from_a_whole_epoch_in_one_step(
    base: Path, tmp_path: Path
) -> None:
    scores = []
    for name, grouped in {"a": True, "b": False}.items():
        recipe = labelled(base, tmp_path / name, train__group_by_length=grouped, train__batch_size=48)
        run = train(recipe)
        scores.append(run.train_loss)
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
