"""Labelled rows: names, numbers and pairs, and long texts that keep their labels."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from lorakit.data import prepare_classification
from lorakit.errors import DataError
from tests.data.samples import BOS, EOS, A, B, C, tokenizer

TOK = tokenizer(adds="<bos>...<eos>")
ROWS = [{"text": "a", "label": "good"}, {"text": "b", "label": "bad"}, {"text": "c", "label": "good"}]


def test_names_become_numbers_in_sorted_order() -> None:
    prepared = prepare_classification(ROWS, TOK, max_length=9)
    assert prepared.labels == ("bad", "good")
    assert list(prepared.dataset) == [
        {"input_ids": [BOS, token, EOS], "labels": label} for token, label in ((A, 1), (B, 0), (C, 1))
    ]
    assert prepared.report.trained_tokens == 3
    assert prepared.report.lines()[1] == "9 tokens, one label a row; longest row 3"


def test_given_names_fix_the_order() -> None:
    prepared = prepare_classification(ROWS, TOK, max_length=9, labels=["good", "bad", "unseen"])
    assert prepared.dataset["labels"][:] == [0, 1, 0]
    assert prepared.labels == ("good", "bad", "unseen")
    assert prepared.report.lines()[-1] == "no row has the label 'unseen'"
    assert prepared.report.lines()[-2] == "3 classes, rows of each: 'good' 2, 'bad' 1"
    assert prepare_classification(ROWS, TOK, max_length=9).report.label_rows == {"bad": 1, "good": 2}


def test_numbers_are_sorted_as_numbers_and_index_given_names() -> None:
    rows = [{"text": "a", "label": n} for n in (10, 2, 0)]
    assert prepare_classification(rows, TOK, max_length=9).labels == ("0", "2", "10")
    two = [{"text": "a", "label": n} for n in (1, 0)]
    assert prepare_classification(two, TOK, max_length=9, labels=["bad", "good"]).dataset["labels"][:] == [1, 0]


def test_the_labels_found_in_training_read_the_validation_rows_alike() -> None:
    train = prepare_classification([{"text": "a", "label": n} for n in (1, 2)], TOK, max_length=9)
    valid = prepare_classification([{"text": "a", "label": n} for n in (2, 2)], TOK, max_length=9, labels=train.labels)
    assert valid.dataset["labels"][:] == [1, 1]


def test_class_names_of_the_dataset_are_kept() -> None:
    features = Features(text=Value("string"), label=ClassLabel(names=["world", "sport"]))
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    prepared = prepare_classification(rows, TOK, max_length=9)
    assert (prepared.labels, prepared.dataset["labels"][:]) == (("world", "sport"), [1, 0])
    turned = prepare_classification(rows, TOK, max_length=9, labels=["sport", "world"])
    assert turned.dataset["labels"][:] == [0, 1]


def test_pairs_are_tokenised_as_pairs_and_need_both_sides() -> None:
    rows = [{"text": "a", "text_pair": "b", "label": 0}, {"text": "a", "text_pair": None, "label": 1}]
    prepared = prepare_classification([*rows[:1], {**rows[1], "text_pair": "c"}], tokenizer(), max_length=9)
    assert prepared.dataset["input_ids"][:] == [[A, B], [A, C]]
    with pytest.raises(DataError, match="row 2: field 'text_pair' is null"):
        prepare_classification(rows, TOK, max_length=9)


def test_long_texts_are_cut_before_their_end_and_counted() -> None:
    rows = [{"text": "c" * 9, "label": 0}, {"text": "c", "label": 1}]
    prepared = prepare_classification(rows, TOK, max_length=5)
    assert prepared.dataset["input_ids"][:] == [[BOS, C, C, C, EOS], [BOS, C, EOS]]
    assert (prepared.report.cut, prepared.report.tokens_lost, prepared.report.longest) == (1, 6, 11)


def test_long_texts_can_be_dropped_or_refused() -> None:
    rows = [{"text": "c" * 9, "label": 0}, {"text": "c", "label": 1}]
    prepared = prepare_classification(rows, TOK, max_length=5, overlong="drop")
    assert (len(prepared.dataset), prepared.report.dropped_overlong, prepared.report.tokens_lost) == (1, 1, 11)
    with pytest.raises(DataError, match="row 1: has 11 tokens; max_length is 5: raise it"):
        prepare_classification(rows, TOK, max_length=5, overlong="error")
    with pytest.raises(DataError, match="every row is longer than 2 tokens; max_length is 2: raise it"):
        prepare_classification(rows, TOK, max_length=2, overlong="drop")


def test_an_unknown_label_is_named_with_its_row_and_the_nearest() -> None:
    with pytest.raises(DataError, match=r"row 1: unknown label 'good'; did you mean 'goods'\?"):
        prepare_classification(ROWS, TOK, max_length=9, labels=["bad", "goods"])


def test_a_number_is_no_index_where_classes_are_numbers() -> None:
    rows = [{"text": "a", "label": n} for n in (1, 0)]
    with pytest.raises(DataError, match=r"the labels are '1', '2':\n  - row 2: unknown label 0"):
        prepare_classification(rows, TOK, max_length=9, labels=["1", "2"])


def test_classes_that_are_one_written_in_two_ways_are_refused() -> None:
    rows = [{"text": "a", "label": name} for name in ("neg", "pos", "Pos", "neg ")]
    with pytest.raises(
        DataError, match="differ in case or blanks alone: 'Pos' and 'pos', 'neg' and 'neg '; write each"
    ):
        prepare_classification(rows, TOK, max_length=9)
    named = prepare_classification(rows, TOK, max_length=9, labels=["neg", "pos", "Pos", "neg "])
    assert named.dataset["labels"][:] == [0, 1, 2, 3]
    with pytest.raises(DataError, match="data.labels names 'neg' more than once"):
        prepare_classification(rows, TOK, max_length=9, labels=["neg", "pos", "neg"])


def test_blank_labels_and_rows_without_a_token_are_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label\na,1\nb,0\nc,\n")
    with pytest.raises(DataError, match=r"rows.csv line 4: field 'label' is empty"):
        prepare_classification(file, TOK, max_length=9)
    rows = [{"text": "a", "label": 0}, {"text": "", "label": 1}]
    with pytest.raises(DataError, match="row 2: has no token"):
        prepare_classification(rows, tokenizer(), max_length=9)
    assert len(prepare_classification(rows, TOK, max_length=9).dataset) == 2, "it adds its own"


def test_of_numbers_beside_nan_that_one_alone_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": NaN}\n{"text": "c", "label": 0}\n')
    with pytest.raises(DataError) as told:
        prepare_classification(file, TOK, max_length=9)
    assert str(told.value).splitlines()[1:] == [
        f"  - {file} line 2: field 'label' is nan, expected a string or an integer"
    ]
    whole = [{"text": "a", "label": 1.0}, {"text": "b", "label": 0.0}]
    assert prepare_classification(whole, TOK, max_length=9).labels == ("0", "1")


def test_a_missing_label_is_named_with_its_row() -> None:
    with pytest.raises(DataError, match="row 2: field 'label' is missing or null, expected a string or an integer"):
        prepare_classification([*ROWS[:1], {"text": "b"}], TOK, max_length=9)


def test_one_class_is_no_classification() -> None:
    with pytest.raises(DataError, match="every row has the label 'good'"):
        prepare_classification(ROWS[:1], TOK, max_length=9)


def test_a_token_the_model_does_not_know_is_named() -> None:
    with pytest.raises(DataError, match="the model only 50 rows"):
        prepare_classification(ROWS, TOK, max_length=9, vocab_size=50)


def test_real_sst2_rows_keep_every_label(shared_data: Path) -> None:
    prepared = prepare_classification(str(shared_data / "sst2" / "validation.jsonl"), TOK, max_length=64)
    assert prepared.labels == ("0", "1")
    assert prepared.report.kept == prepared.report.rows == len(prepared.dataset)
