"""Reading rows: every kind of file gives the same rows, and every fault names its file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from lorakit.data.readers import from_records, locate, read_rows
from lorakit.errors import DataError

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c, d", "completion": "e\nf"}]


def jsonl(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def write(path: Path) -> Path:
    if path.suffix == ".jsonl":
        return jsonl(path, *ROWS)
    if path.suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif path.suffix == ".csv":
        path.write_text('prompt,completion\na,b\n"c, d","e\nf"\n')
    else:
        Dataset.from_list(ROWS).to_parquet(path)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    assert list(read_rows(str(write(tmp_path / name)))) == ROWS


def test_a_json_file_may_hold_one_object_a_line(tmp_path: Path) -> None:
    assert list(read_rows(str(jsonl(tmp_path / "a.json", *ROWS)))) == ROWS


def test_a_byte_order_mark_is_not_part_of_the_first_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]), encoding="utf-8-sig")
    assert list(read_rows(str(tmp_path / "a.jsonl"))) == ROWS[:1]


def test_a_line_separator_inside_a_string_does_not_end_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028two"}\n', encoding="utf-8")
    assert list(read_rows(str(tmp_path / "a.jsonl"))) == [{"text": "one\u2028two"}]


def test_a_parquet_file_keeps_its_class_names(tmp_path: Path) -> None:
    features = Features(text=Value("string"), label=ClassLabel(names=["bad", "good"]))
    Dataset.from_dict({"text": ["x"], "label": [1]}, features=features).to_parquet(tmp_path / "a.parquet")
    assert read_rows(str(tmp_path / "a.parquet")).features["label"].names == ["bad", "good"]


def test_malformed_lines_are_all_named_with_their_numbers(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "x"}, "", '{"text": }', '["x"]')
    with pytest.raises(DataError) as error:
        read_rows(str(path))
    assert f"{path} line 3: Expecting value at column 10" in str(error.value)
    assert f"{path} line 4: is a list" in str(error.value)


def test_a_hundred_bad_lines_still_fit_on_one_screen(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="and 88 more") as error:
        read_rows(str(jsonl(tmp_path / "a.jsonl", *["{"] * 100)))
    assert len(str(error.value).splitlines()) < 20


def test_the_odd_type_in_a_column_is_named_with_its_line(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "x"}, {"text": 5}, {"text": "y"}, {"text": None})
    with pytest.raises(DataError, match=f"{path} line 2: 'text' is a number, but a string in 2 rows"):
        read_rows(str(path))


def test_the_odd_type_deep_in_a_conversation_is_named_too(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": content}]} for content in ("a", "b", 3)]
    with pytest.raises(DataError, match=r"line 3: 'messages\[\].content' is a number"):
        read_rows(str(jsonl(tmp_path / "a.jsonl", *rows)))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the dataset is empty"):
        read_rows(str(jsonl(tmp_path / "a.jsonl")))
    with pytest.raises(DataError, match="the dataset is empty"):
        from_records([])


def test_a_csv_row_with_too_many_cells_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nfine\none, two\n")
    with pytest.raises(DataError, match=r"a\.csv line 3: more cells than columns"):
        read_rows(str(tmp_path / "a.csv"))


def test_a_file_that_is_not_utf8_says_where(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' * 2000 + b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl line 2001: not UTF-8 text; convert the file to UTF-8"):
        read_rows(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"text": "a\n', "line 2: Invalid control character at column 12"),
        ('{"text": "b', "line 2: Unterminated string starting at column 10; the file ends there, so it looks cut off"),
        ('{"text": ', "line 2: Expecting value at column 10; the file ends there, so it looks cut off"),
        ('{"text": 1}}', "line 2: Extra data at column 12"),
        ('{"n": ' + "9" * 5000 + "}", "line 2: an integer of more than 4,300 digits"),
        ('{"n": ' + "[" * 100_000, "line 2: brackets nested too deeply"),
        ('{"n": ' + "[" * 300 + "]" * 300 + "}", "line 2: brackets nested more than 100 deep"),
    ],
)
def test_a_line_that_is_no_json_says_what_and_where(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + text)
    with pytest.raises(DataError) as error:
        read_rows(str(tmp_path / "a.jsonl"))
    assert str(error.value).splitlines()[1] == f"  - {tmp_path / 'a.jsonl'} {what}"


def test_a_json_array_that_is_cut_off_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "a"},\n {"text": "b"')
    with pytest.raises(DataError, match=r"a\.json line 2: Expecting ',' delimiter at column 14; the file ends there"):
        read_rows(str(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"a\.json: brackets nested too deeply"):
        read_rows(str(tmp_path / "a.json"))


def test_half_a_character_is_named_with_its_line(tmp_path: Path) -> None:
    deep = r'{"text": "a", "more": [{"x": "\ud83d"}]}'
    path = jsonl(tmp_path / "a.jsonl", {"text": "whole \U0001f600"}, r'{"text": "\ud83d"}', deep)
    with pytest.raises(DataError) as error:
        read_rows(str(path))
    assert str(error.value).splitlines()[1:] == [f"  - {path} line 2: 'text'", f"  - {path} line 3: 'more'"]


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file"):
        read_rows(str(tmp_path / "a.parquet"))


def test_a_folder_is_read_whole_in_the_order_of_its_names(tmp_path: Path) -> None:
    jsonl(tmp_path / "b.jsonl", {"text": "second"})
    jsonl(tmp_path / "a.jsonl", {"text": "first"})
    (tmp_path / "notes.md").write_text("not data")
    assert read_rows(str(tmp_path))["text"][:] == ["first", "second"]


def test_hidden_files_and_folders_are_not_data(tmp_path: Path) -> None:
    (tmp_path / ".cache").mkdir()
    for name in ("a.jsonl", ".b.jsonl", ".cache/c.jsonl"):
        jsonl(tmp_path / name, {"text": name})
    assert read_rows(str(tmp_path))["text"][:] == ["a.jsonl"]


def test_faults_are_listed_in_the_order_of_their_lines(tmp_path: Path) -> None:
    rows = [{"text": "x"}] * 8 + [{"text": 1}, {"text": "y"}, {"text": []}]
    with pytest.raises(DataError) as error:
        read_rows(str(jsonl(tmp_path / "a.jsonl", *rows)))
    assert str(error.value).index("line 9: 'text' is a number") < str(error.value).index("line 11: 'text' is a list")


def test_a_folder_with_train_and_test_asks_which(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "valid", "test"):
        jsonl(tmp_path / f"{name}.jsonl", {"text": name})
    with pytest.raises(DataError, match=r"holds \['test', 'train', 'validation'\]; name one file or choose a split"):
        read_rows(str(tmp_path))
    assert read_rows(str(tmp_path), "train")["text"][:] == ["train-0", "train-1"]
    assert read_rows(str(tmp_path), "validation")["text"][:] == ["valid"]
    with pytest.raises(DataError, match="no file of split 'trial'"):
        read_rows(str(tmp_path), "trial")


def test_files_of_a_folder_must_hold_the_same_types(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", {"text": "x"})
    jsonl(tmp_path / "b.jsonl", {"text": 1})
    with pytest.raises(DataError, match="do not hold the same columns") as error:
        read_rows(str(tmp_path))
    assert "b.jsonl" in str(error.value)


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", *ROWS)
    with pytest.raises(DataError, match=r"no such file or folder; did you mean 'train\.jsonl'\?"):
        read_rows(str(tmp_path / "trian.jsonl"))


def test_an_unknown_suffix_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"cannot read '\.txt'; expected one of \.jsonl, \.json, \.csv, \.parquet"):
        read_rows(str(tmp_path / "a.txt"))


def test_a_name_that_is_no_path_is_tried_on_the_hub_and_both_readings_are_told() -> None:
    with pytest.raises(DataError, match="neither a local file or folder .* nor a dataset the hub could give"):
        read_rows("somebody/some-dataset")


def test_locate_counts_rows_over_files_and_blank_lines(tmp_path: Path) -> None:
    first = jsonl(tmp_path / "a.jsonl", {"text": "0"}, "", {"text": "1"})
    second = jsonl(tmp_path / "b.jsonl", {"text": "2"})
    assert locate(str(tmp_path), None, [2, 1]) == [f"{second} line 1", f"{first} line 3"]


def test_rows_in_memory_have_the_union_of_their_keys() -> None:
    assert from_records([{"a": 1}, {"b": 2}]).column_names == ["a", "b"]


def test_a_csv_cell_beyond_the_limit_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nfine\n" + "x" * 140_000 + "\n")
    with pytest.raises(DataError, match=r"a\.csv line 3: field larger than field limit \(131072\); .* as JSONL"):
        read_rows(str(tmp_path / "a.csv"))


@pytest.mark.parametrize("odd", [{"id": 2**70}, {"id": -(2**63) - 1}])
def test_an_integer_beyond_64_bits_is_named_with_its_line(tmp_path: Path, odd: dict[str, int]) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"id": 2**63 - 1}, odd)
    with pytest.raises(DataError, match=rf"must fit into 64 bits(.|\n)*{path} line 2: 'id'"):
        read_rows(str(path))


def test_an_integer_beyond_64_bits_deep_in_a_row_is_named_too() -> None:
    with pytest.raises(DataError, match=r"row 1: 'a\[\]\.b'"):
        from_records([{"a": [{"b": 2**64}]}])


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = write(tmp_path / name)

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refused)
    monkeypatch.setattr("pyarrow.parquet.read_table", refused)
    with pytest.raises(DataError, match=rf"^{path}: cannot be read: Permission denied$"):
        read_rows(str(path))


def test_what_is_neither_a_file_nor_a_folder_is_said_so() -> None:
    with pytest.raises(DataError, match="^/dev/null is not a regular file; give a file of rows"):
        read_rows("/dev/null")


def test_a_relative_file_that_is_not_there_says_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"^train\.jsonl: no such file or folder; looked for {tmp_path}/train\.jsonl$"):
        read_rows("train.jsonl")
