"""Packing: nothing is lost, nothing leaks, and where a model leaks it is caught by measuring."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from lorakit.data import prepare
from lorakit.data.masking import IGNORE
from lorakit.data.packing import (
    Collator,
    bins,
    example_lengths,
    pack,
    packing_is_isolated,
    packing_leak,
    refuse_leaky_packing,
    unpack,
)
from lorakit.errors import DataError
from tests.data.samples import PAD, model, tokenizer

# flex attention runs uncompiled here, which takes milliseconds instead of half a minute and makes torch say so
FLEX = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
BACKENDS = [
    pytest.param(family, attention, marks=FLEX if attention == "flex_attention" else ())
    for family in ("llama", "qwen2", "gpt2")
    for attention in ("eager", "sdpa", "flex_attention")
    if (family, attention) != ("gpt2", "flex_attention")  # which transformers does not offer
]
ROWS = [{"prompt": "c" * n, "completion": "ab" * m} for n, m in ((1, 2), (5, 1), (9, 4), (2, 9), (4, 4), (7, 3))]


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
    packed = pack(examples(3, 5, 2), 8, seed=0)
    assert sorted(map(tuple, packed["position_ids"])) == [(0, 1), (0, 1, 2, 3, 4, 0, 1, 2)]
    assert sorted(map(tuple, packed["input_ids"])) == [(3, 4, 5, 6, 7, 0, 1, 2), (8, 9)]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(0, 3))
def test_unpacking_gives_the_examples_back_up_to_their_order(lengths: list[int], seed: int) -> None:
    rows = examples(*lengths)
    packed = pack(rows, 12, seed)
    assert sorted(unpack(packed), key=lambda row: row["input_ids"]) == list(rows)
    trained = sum(label != IGNORE for row in packed for label in row["labels"])
    assert trained == sum(label != IGNORE for row in rows for label in row["labels"])


def test_the_seed_orders_the_packs() -> None:
    rows = examples(*range(3, 12))
    orders = {seed: pack(rows, 12, seed)["input_ids"][:] for seed in (0, 1)}
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] == pack(rows, 12, 0)["input_ids"][:]


def test_packing_sees_only_the_rows_that_were_selected() -> None:
    chosen = examples(3, 4, 5).select([2, 0])
    assert sorted(unpack(pack(chosen, 12))["input_ids"]) == [[0, 1, 2], [7, 8, 9, 10, 11]]


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


def losses(network: Any, rows: Dataset) -> dict[tuple[int, ...], float]:
    """Summed loss of each example, found by its ids, over one batch of all rows."""
    batch = Collator(PAD)(list(rows))
    with torch.no_grad():
        logits = network(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    token_loss = cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    found = {}
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        starts = [j for j, at in enumerate(row.get("position_ids", range(length))) if at == 0]
        for start, stop in pairwise([*starts, length]):
            found[tuple(row["input_ids"][start:stop])] = float(token_loss[i, start : stop - 1].sum())
    return found


@pytest.fixture
def uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("family", "attention"), BACKENDS)
def test_an_example_has_the_same_loss_packed_and_alone(family: str, attention: str) -> None:
    network = model(family, attention)
    packed = losses(network, prepare(ROWS, tokenizer(), max_length=30, packing=True).dataset)
    alone: dict[tuple[int, ...], float] = {}
    for row in prepare(ROWS, tokenizer(), max_length=30).dataset:
        alone |= losses(network, Dataset.from_list([row]))
    assert packed.keys() == alone.keys()
    for ids, loss in alone.items():
        assert packed[ids] == pytest.approx(loss, rel=1e-6)  # fp32 sums of a dozen losses near 5, in another order


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("family", "attention"), BACKENDS)
def test_isolation_is_measured_for_each_attention_backend(family: str, attention: str) -> None:
    network = model(family, attention)
    assert packing_leak(network) < 1e-6
    refuse_leaky_packing(network)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_cache_breaks_isolation_and_is_caught(attention: str) -> None:
    network = model("llama", attention, use_cache=True)
    assert not packing_is_isolated(network)
    assert packing_is_isolated(network, use_cache=False)


def test_a_family_that_ignores_positions_is_refused_with_the_remedy() -> None:
    with pytest.raises(DataError, match="packing leaks in OPTForCausalLM with attention 'sdpa'.*set packing: false"):
        refuse_leaky_packing(model("opt", "sdpa"))


def test_a_model_that_takes_no_positions_leaks_by_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    network = model("gpt2", "sdpa")
    monkeypatch.setattr(network, "forward", lambda input_ids: None)
    assert packing_leak(network) == math.inf


def test_the_measurement_leaves_the_model_in_its_mode() -> None:
    network = model("llama", "sdpa").train()
    packing_leak(network)
    assert network.training


def test_examples_have_the_same_lengths_packed_and_apart() -> None:
    rows = examples(3, 2, 1, 4)
    assert example_lengths(rows) == [3, 2, 1, 4]
    assert sorted(example_lengths(pack(rows, 6))) == [1, 2, 3, 4]
