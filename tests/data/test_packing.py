"""Packing: nothing is lost, rows are as long as costs least, and a prompt that repeats stands once."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.branches import tree_mask
from lorakit.data.masking import IGNORE
from lorakit.data.packing import Collator, PackRule, bins, example_lengths, pack, unpack
from tests.data.samples import PAD


def examples(*lengths: int) -> Dataset:
    """Rows of these lengths, every token different, the first half of each masked."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    ids = [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)]
    return Dataset.from_dict({"input_ids": ids, "labels": [[IGNORE] * (len(i) // 2) + i[len(i) // 2 :] for i in ids]})


def test_best_fit_decreasing_by_hand() -> None:
    # 7 and 6 open bins; 4 fits best beside 6 (room 4), 3 beside 7 (room 3); 2 opens the third.
    assert bins([4, 7, 2, 6, 3], 10) == [[1, 4], [3, 0], [2]]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_bins_hold_everything_once_and_never_overflow(lengths: list[int]) -> None:
    found = bins(lengths, 20)
    assert sorted(i for members in found for i in members) == list(range(len(lengths)))
    rooms = [20 - sum(lengths[i] for i in members) for members in found]
    assert min(rooms) >= 0
    first = [lengths[members[0]] for members in found]
    assert all(first[j] > rooms[i] for j in range(len(found)) for i in range(j))  # no bin was opened without need


def test_positions_start_again_with_every_example() -> None:
    packed = pack(examples(3, 5, 2), PackRule(8), seed=0).rows
    assert sorted(map(tuple, packed["position_ids"])) == [(0, 1), (0, 1, 2, 3, 4, 0, 1, 2)]
    assert sorted(map(tuple, packed["input_ids"])) == [(3, 4, 5, 6, 7, 0, 1, 2), (8, 9)]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(0, 3))
def test_unpacking_gives_the_examples_back_up_to_their_order(lengths: list[int], seed: int) -> None:
    rows = examples(*lengths)
    packed = pack(rows, PackRule(12), seed).rows
    assert sorted(unpack(packed), key=lambda row: row["input_ids"]) == list(rows)
    trained = sum(label != IGNORE for row in packed for label in row["labels"])
    assert trained == sum(label != IGNORE for row in rows for label in row["labels"])


def test_the_seed_orders_the_packs() -> None:
    rows = examples(*range(3, 12))
    orders = {seed: pack(rows, PackRule(12), seed).rows["input_ids"][:] for seed in (0, 1)}
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] == pack(rows, PackRule(12), 0).rows["input_ids"][:]


def test_packing_sees_only_the_rows_that_were_selected() -> None:
    chosen = examples(3, 4, 5).select([2, 0])
    assert sorted(unpack(pack(chosen, PackRule(12)).rows)["input_ids"]) == [[0, 1, 2], [7, 8, 9, 10, 11]]


def test_unpacked_rows_are_padded_on_the_right_under_a_mask() -> None:
    batch = Collator(PAD)([{"input_ids": [7, 8], "labels": [IGNORE, 8]}, {"input_ids": [9], "labels": [IGNORE]}])
    assert batch["input_ids"].tolist() == [[7, 8], [9, PAD]]
    assert batch["labels"].tolist() == [[IGNORE, 8], [IGNORE, IGNORE]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert "position_ids" not in batch


def test_packed_rows_get_no_mask_and_their_padding_is_an_example_of_its_own() -> None:
    rows = [
        {"input_ids": [7, 8, 9], "labels": [IGNORE, 8, IGNORE], "position_ids": [0, 1, 0]},
        {"input_ids": [5], "labels": [IGNORE], "position_ids": [0]},
    ]
    batch = Collator(PAD)(rows)
    assert batch["position_ids"].tolist() == [[0, 1, 0], [0, 0, 1]]
    assert batch["input_ids"].tolist() == [[7, 8, 9], [5, PAD, PAD]]
    assert set(batch) == {"input_ids", "labels", "position_ids"}


def test_an_end_that_is_also_the_padding_stays_trained() -> None:
    batch = Collator(8)([{"input_ids": [7, 8], "labels": [IGNORE, 8]}, {"input_ids": [5], "labels": [IGNORE]}])
    assert batch["labels"].tolist() == [[IGNORE, 8], [IGNORE, IGNORE]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_examples_have_the_same_lengths_packed_and_apart() -> None:
    rows = examples(3, 2, 1, 4)
    assert example_lengths(rows) == [3, 2, 1, 4]
    assert sorted(example_lengths(pack(rows, PackRule(6)).rows)) == [1, 2, 3, 4]


def answers(*groups: tuple[int, list[int]]) -> Dataset:
    """Rows of groups (tokens of the prompt, tokens of each answer); every prompt token and every answer differ."""
    rows, fresh = [], 1000
    for number, (prompt, sizes) in enumerate(groups):
        shared = [100 * number + at for at in range(prompt)]
        for size in sizes:
            own = list(range(fresh, fresh + size))
            fresh += size
            rows.append({"input_ids": shared + own, "labels": [IGNORE] * prompt + own})
    return Dataset.from_list(rows)


def test_a_shared_prompt_by_hand() -> None:
    packed = pack(answers((3, [2, 1])), PackRule(8, share=0.0))
    (row,) = packed.rows
    assert row["input_ids"] == [0, 1, 2, 1000, 1001, 2, 1002]  # each branch begins with the prompt's last token
    assert row["labels"] == [IGNORE, IGNORE, IGNORE, 1000, 1001, IGNORE, 1002]
    assert row["position_ids"] == [0, 1, 2, 3, 4, 2, 3]
    assert row["branches"] == [0, 0, 1, 1, 1, 2, 2]
    assert packed.saved == 2


def test_a_token_sees_its_branch_and_what_that_grew_out_of() -> None:
    mask = tree_mask(torch.tensor([[0, 1, 2, 1, 0]]), torch.tensor([[0, 1, 1, 2, 0]]))
    assert mask.shape == (1, 1, 5, 5)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]


GROUPS = st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(1, 6), min_size=1, max_size=9)), min_size=1)


@given(GROUPS, st.sampled_from([None, 40.0]), st.integers(0, 3))
def test_unpacking_gives_each_example_its_prompt_back(
    groups: list[tuple[int, list[int]]], balance: float | None, seed: int
) -> None:
    rows = answers(*groups[:9])
    packed = pack(rows, PackRule(24, balance, share=-1.0), seed)
    assert sorted(unpack(packed.rows), key=lambda row: row["input_ids"]) == sorted(rows, key=lambda r: r["input_ids"])
    assert sorted(example_lengths(packed.rows)) == sorted(map(len, rows["input_ids"]))
    stored = [len(ids) for ids in packed.rows["input_ids"]]
    assert max(stored) <= packed.length
    assert sum(stored) == sum(map(len, rows["input_ids"])) - packed.saved


def test_a_group_longer_than_a_row_repeats_its_prompt() -> None:
    packed = pack(answers((4, [5] * 5)), PackRule(16, share=0.0))
    assert [len(ids) for ids in packed.rows["input_ids"]] in ([15, 15, 9], [15, 9, 15], [9, 15, 15])
    assert all(ids[:4] == [0, 1, 2, 3] for ids in packed.rows["input_ids"])


def test_prompts_are_shared_only_where_that_saves_enough() -> None:
    rows = answers((4, [20, 20]), *((4, [20]) for _ in range(9)))  # 3 of 264 tokens, and then not a row less
    assert "branches" not in pack(rows, PackRule(48, share=0.1)).rows.column_names
    assert pack(rows, PackRule(48, share=0.1)).saved == 0
    assert pack(rows, PackRule(48, share=-1.0)).saved == 3


def test_a_prompt_that_is_trained_too_is_never_shared() -> None:
    ids = [[1, 2, 3, 4], [1, 2, 3, 5]]
    rows = Dataset.from_dict({"input_ids": ids, "labels": [[IGNORE, *one[1:]] for one in ids]})
    assert pack(rows, PackRule(8, share=-1.0)).saved == 0


def attention(rows: Dataset) -> int:
    """Pairs of places that attention computes."""
    return sum(len(ids) ** 2 for ids in rows["input_ids"])


def test_rows_are_no_longer_than_their_attention_pays_for() -> None:
    rows = examples(*(20 + i % 13 for i in range(400)))
    long, short = pack(rows, PackRule(4096)), pack(rows, PackRule(4096, balance=1400.0))
    assert (long.length, long.together) == (4096, 1)
    assert short.length <= 512
    assert attention(short.rows) < attention(long.rows) / 8
    assert sum(example_lengths(rows)) > 0.94 * len(short.rows) * short.length
    assert 0.9 * 4096 < short.length * short.together <= 4096, "a step holds what it held"


@pytest.mark.parametrize("room", [600, 1024, 4096])
def test_a_step_holds_as_many_examples_with_shared_prompts(room: int) -> None:
    rows = answers(*((30 + i % 7, [20 + j % 5 for j in range(8)]) for i in range(60)))
    alone, shared = pack(rows, PackRule(room, 1400.0)), pack(rows, PackRule(room, 1400.0, share=0.1))
    assert shared.saved > 0.3 * sum(example_lengths(rows))
    steps = [len(packed.rows) / packed.together for packed in (alone, shared)]
    assert steps[1] == pytest.approx(steps[0], rel=0.15)
    assert shared.length * shared.together <= room


def test_no_row_is_longer_than_allowed_nor_shorter_than_the_longest_example() -> None:
    assert pack(examples(90, 30), PackRule(4096, 1e9, longest=128)).length <= 128
    assert pack(examples(90, 30), PackRule(4096, 1.0)).length >= 90
    assert pack(examples(90, 30), PackRule(64)).length == 90
    assert pack(examples(500, 500), PackRule(1000, 1e9, longest=512)).length >= 500
