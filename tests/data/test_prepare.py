"""From a source to a dataset: what is lost is counted, what is wrong is traced to its row."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_from_disk

from lorakit.data import DataReport, PackRule, prepare
from lorakit.data.masking import IGNORE
from lorakit.errors import DataError
from tests.data.samples import EOS, NEWLINE, PLAIN, A, B, C, tokenizer

TEN = [{"prompt": "c" * n, "completion": "b"} for n in range(1, 11)]  # n + 3 tokens each


def test_rows_become_ids_and_labels_with_a_report() -> None:
    prepared = prepare(
        [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}], tokenizer(), max_length=8
    )
    row = {"input_ids": [A, NEWLINE, B, EOS], "labels": [IGNORE, IGNORE, B, EOS]}
    assert list(prepared.dataset) == [row, row]
    assert prepared.report == DataReport(
        source="rows in memory",
        format="prompt+completion",
        rows=2,
        kept=2,
        tokens=8,
        trained_tokens=4,
        longest=4,
        max_length=8,
        duplicates=1,
        separator_used="\n",
    )


def test_the_default_drops_overlong_rows_and_counts_them() -> None:
    report = prepare(TEN, tokenizer(), max_length=10).report
    assert (report.kept, report.dropped_overlong, report.tokens_lost) == (7, 3, 11 + 12 + 13)
    assert (report.longest, report.tokens, report.trained_tokens) == (13, sum(range(4, 11)), 14)
    assert report.lines()[1] == "49 tokens, 14 of them trained (29%); longest row 13"
    assert "dropped 3 rows (30.0%) longer than 10 tokens: 36 tokens" in report.lines()


def test_cutting_keeps_the_rows_and_counts_what_it_took() -> None:
    rows = [{"prompt": "a", "completion": "c" * 9}, {"prompt": "a", "completion": "c"}]
    prepared = prepare(rows, tokenizer(), max_length=5, overlong="cut")
    assert prepared.dataset[0]["labels"] == [IGNORE, IGNORE, C, C, C]
    assert (prepared.report.kept, prepared.report.cut, prepared.report.tokens_lost) == (2, 1, 7)


@pytest.mark.parametrize("length", [5, 6, 7, 9, 10, 11, 17])
def test_splitting_a_text_predicts_every_token_once(length: int) -> None:
    text = "".join(chr(ord("c") + i) for i in range(length - 1))
    whole = prepare([{"text": text}], tokenizer(), max_length=64)
    pieces = prepare([{"text": text}], tokenizer(), max_length=5, overlong="split")
    trained = [label for row in pieces.dataset for label in row["labels"] if label != IGNORE]
    assert trained == whole.dataset[0]["labels"][1:]
    assert all(len(row["input_ids"]) <= 5 for row in pieces.dataset)
    assert (pieces.report.split, pieces.report.tokens_lost) == (int(length > 5), 0)


def test_splitting_is_for_plain_text() -> None:
    with pytest.raises(DataError, match="split is for plain text"):
        prepare(TEN, tokenizer(), max_length=10, overlong="split")


def test_overlong_rows_can_be_an_error_that_lists_them() -> None:
    with pytest.raises(DataError, match="row 9: has 12 tokens; max_length is 11: raise it"):
        prepare(TEN, tokenizer(), max_length=11, overlong="error")


def test_rows_that_are_all_too_long_are_refused() -> None:
    with pytest.raises(DataError, match=r"longer than 3 tokens \(the longest has 13\); max_length is 3: raise it, or"):
        prepare(TEN, tokenizer(), max_length=3)


def test_a_row_whose_prompt_fills_the_length_is_shown_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": "b"}) + "\n" for p in ("a", "a long prompt")))
    with pytest.raises(DataError) as error:
        prepare(str(path), tokenizer(), max_length=6, overlong="cut")
    assert f"1 rows have no token to train on:\n  - {path} line 2\n" in str(error.value)
    assert "\na long\n" in str(error.value)
    assert "the prompt alone fills the row; max_length is 6: raise it, or choose overlong: drop" in str(error.value)


def test_a_conversation_without_an_answer_is_shown_with_the_remedy() -> None:
    rows = [{"messages": [{"role": "user", "content": "hello"}]}]
    with pytest.raises(DataError, match=r"<user>hello<eos>\n+a conversation needs a turn of the assistant"):
        prepare(rows, tokenizer(PLAIN), max_length=20)


def test_an_empty_text_has_nothing_to_train() -> None:
    with pytest.raises(DataError, match=r"1 rows have no token to train on:\n  - row 2\n"):
        prepare([{"text": "a"}, {"text": ""}], tokenizer(), max_length=20)


def test_a_row_without_prompt_and_completion_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "", "completion": ""}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as error:
        prepare(str(path), tokenizer(), max_length=20)
    assert f"{path} line 2: 'prompt' and 'completion' are both empty" in str(error.value)
    with pytest.raises(DataError, match="row 1: 'instruction' and 'output' are both empty"):
        prepare([{"instruction": "", "input": "", "output": ""}], tokenizer(), max_length=90)


def test_empty_completions_are_counted_and_do_not_change_the_seam() -> None:
    rows = [{"prompt": "a", "completion": " b"}, {"prompt": "a", "completion": ""}, {"prompt": "c", "completion": ""}]
    report = prepare(rows, tokenizer(), max_length=9).report
    assert (report.separator_used, report.empty_completions) == ("", 2)
    assert "2 rows have an empty completion, so they teach the model to say nothing" in report.lines()
    assert prepare(rows[1:], tokenizer(), max_length=9).report.separator_used == "\n"


def test_special_tokens_in_the_user_s_text_are_counted_and_said() -> None:
    rows = [{"prompt": "a", "completion": "b<eos>c"}, {"prompt": "<user>", "completion": "b"}, *TEN]
    report = prepare(rows, tokenizer(), max_length=30).report
    assert report.special_tokens == 2
    assert "2 rows hold special tokens in their text ('<eos>', '<user>'), and they are read as such" in report.lines()
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert prepare([{"messages": turns}], tokenizer(PLAIN), max_length=30).report.special_tokens == 0
    turns[0]["content"] = "<pad>"
    report = prepare([{"messages": turns}], tokenizer(PLAIN), max_length=30).report
    assert "1 row holds special tokens in its text ('<pad>'), and they are read as such" in report.lines()


def test_a_fault_of_the_template_is_traced_to_its_rows() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
    turns = [[{"role": role, "content": "a"}, {"role": "assistant", "content": "b"}] for role in ("user", "system")]
    with pytest.raises(DataError, match="row 2: the chat template refuses this conversation: no system"):
        prepare([{"messages": turn} for turn in turns], tokenizer(template), max_length=20)


def test_a_null_field_is_traced_to_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": null}\n{"other": 1}\n')
    with pytest.raises(DataError) as error:
        prepare(str(path), tokenizer(), max_length=20)
    assert f"{path} line 3: field 'text' is missing or null" in str(error.value)
    assert f"{path} line 4: field 'text' is missing or null" in str(error.value)


def test_a_token_the_model_does_not_know_is_named() -> None:
    prepare([{"text": "a"}], tokenizer(), max_length=9, vocab_size=A + 1)
    with pytest.raises(
        DataError, match=r"tokenizer has 263 tokens, the model only 107 rows: the data uses id 107 \('a'\)"
    ):
        prepare([{"text": "a"}], tokenizer(), max_length=9, vocab_size=A)


def test_a_given_separator_is_used_as_it_is() -> None:
    rows = [{"prompt": "a", "completion": " b"}]
    assert prepare(rows, tokenizer(), max_length=9).report.separator_used == ""
    assert prepare(rows, tokenizer(), max_length=9, separator=" -> ").report.separator_used == " -> "


def test_packing_fills_rows_and_says_how_full() -> None:
    report = prepare(TEN, tokenizer(), max_length=13, packing=PackRule(13)).report
    assert report.packs is not None
    assert report.packing_efficiency == pytest.approx(report.tokens / (report.packs * 13))
    assert report.lines()[-1] == f"packed into {report.packs} rows of 13, {report.packing_efficiency:.1%} full"


def test_a_shared_prompt_is_said_and_counts_once() -> None:
    rows = [{"prompt": "c" * 9, "completion": word} for word in ("a", "b", "c")]  # 12 tokens each
    report = prepare(rows, tokenizer(), max_length=24, packing=PackRule(24, share=0.1)).report
    assert (report.tokens, report.tokens_shared, report.packs) == (36, 18, 1)
    assert report.packing_efficiency == 18 / 24
    assert report.lines()[-1] == "a prompt stands once for all its answers: 18 tokens (50%) less"


def test_nothing_is_written_where_the_data_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abc"}\n')
    monkeypatch.chdir(tmp_path)
    prepared = prepare("a.jsonl", tokenizer(), max_length=9, packing=PackRule(9))
    assert os.listdir(tmp_path) == ["a.jsonl"]
    assert prepared.dataset.cache_files == []


def test_rows_that_live_on_disk_get_no_cache_beside_them(tmp_path: Path) -> None:
    Dataset.from_list([{"text": "abc"}]).save_to_disk(tmp_path)
    before = sorted(os.listdir(tmp_path))
    prepared = prepare(load_from_disk(tmp_path), tokenizer(), max_length=9)
    assert sorted(os.listdir(tmp_path)) == before
    assert prepared.dataset.cache_files == []


@pytest.mark.parametrize(("name", "value", "near"), [("overlong", "trim", ""), ("loss", "completion", "completions")])
def test_a_misspelt_choice_is_refused(name: str, value: str, near: str) -> None:
    with pytest.raises(DataError, match=f"unknown choice '{value}'.*{near}"):
        prepare(TEN, tokenizer(), max_length=9, **{name: value})  # type: ignore[arg-type]


def test_a_length_of_one_token_cannot_hold_a_prediction() -> None:
    with pytest.raises(DataError, match="max_length is 1; expected at least 2"):
        prepare(TEN, tokenizer(), max_length=1)


def test_the_report_is_plain_json() -> None:
    report = prepare(TEN, tokenizer(), max_length=13).report
    assert DataReport(**json.loads(json.dumps(report.to_json()))) == report


def test_real_e2e_rows_lose_nothing_and_train_exactly_their_completions(shared_data: Path) -> None:
    source = shared_data / "e2e" / "validation.jsonl"
    rows: list[dict[str, Any]] = [json.loads(line) for line in source.read_text().splitlines()]
    prepared = prepare(source, (tok := tokenizer()), max_length=1024)
    assert (prepared.report.rows, prepared.report.kept, prepared.report.format) == (427, 427, "prompt+completion")
    for row, tokens in zip(rows, prepared.dataset, strict=True):
        trained = [label for label in tokens["labels"] if label != IGNORE]
        assert tok.decode(trained) == row["completion"] + "<eos>"
        assert tok.decode(tokens["input_ids"]) == row["prompt"] + "\n" + row["completion"] + "<eos>"
