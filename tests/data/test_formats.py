"""Recognising formats by their columns, and refusing what is unclear or unsound, by place and name."""

from __future__ import annotations

from typing import Any

import pytest

from lorakit.data.formats import FORMATS, check, detect, named
from lorakit.data.readers import from_records
from lorakit.errors import DataError

SAY = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SAMPLES: dict[str, dict[str, Any]] = {
    "text": {"text": "a"},
    "prompt+completion": {"prompt": "a", "completion": "b"},
    "messages": {"messages": SAY},
    "alpaca": {"instruction": "a", "input": "", "output": "b"},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "classification": {"text": "a", "text_pair": "b", "label": 1},
}


def places(rows: Any) -> list[str]:
    return [f"place {row}" for row in rows]


def fault(form: str, *rows: dict[str, Any]) -> str:
    with pytest.raises(DataError) as error:
        check(from_records(rows), FORMATS[form], places)
    return str(error.value)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_recognised_by_its_columns_and_accepts_its_sample(name: str) -> None:
    rows = from_records([{**SAMPLES[name], "id": 7}])
    assert detect(rows).name == name
    check(rows, FORMATS[name], places)


def test_a_misspelt_column_is_named_with_the_right_one() -> None:
    with pytest.raises(DataError) as error:
        detect(from_records([{"promt": "a", "completion": "b"}]))
    assert "fit no known format" in str(error.value)
    assert "'promt'; did you mean 'prompt'" in str(error.value)
    assert "- prompt+completion: prompt (a string), completion (a string)" in str(error.value)


def test_two_formats_at_once_must_be_chosen_between() -> None:
    rows = from_records([{**SAMPLES["text"], **SAMPLES["messages"]}])
    with pytest.raises(DataError, match="fit 'text' and 'messages'; choose one with `format`"):
        detect(rows)
    assert named("messages", rows).name == "messages"


def test_a_format_named_against_the_columns_is_refused() -> None:
    rows = from_records([SAMPLES["text"]])
    with pytest.raises(DataError, match=r"format 'messages' needs the columns \['messages'\]"):
        named("messages", rows)
    with pytest.raises(DataError, match="unknown format 'mesages'.*did you mean 'messages'"):
        named("mesages", rows)


def test_missing_and_null_fields_are_listed_with_their_places() -> None:
    text = fault("prompt+completion", SAMPLES["prompt+completion"], {"prompt": "a"}, {"completion": "b"})
    assert "place 1: field 'completion' is missing or null, expected a string" in text
    assert "place 2: field 'prompt' is missing or null, expected a string" in text


def test_a_number_where_text_belongs_is_named() -> None:
    assert "place 0: field 'text' is a number, expected a string" in fault("text", {"text": 1.5})


def test_an_empty_conversation_and_a_turn_without_content_are_named() -> None:
    rows = [{"messages": SAY}, {"messages": []}, {"messages": [SAY[0], {"role": "assistant"}]}]
    assert "place 1: field 'messages' is empty" in fault("messages", *rows)
    assert "place 2: field 'messages' turn 2: 'content' is not a string" in fault("messages", *rows)


def test_a_turn_that_only_calls_a_tool_may_say_nothing() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    check(from_records([{"messages": [SAY[0], call]}]), FORMATS["messages"], places)


def test_an_unknown_speaker_is_named() -> None:
    row = {"conversations": [{"from": "narrator", "value": "a"}]}
    assert "turn 1: unknown speaker 'narrator', expected one of system, human" in fault("sharegpt", row)


def test_an_optional_field_may_be_null_but_not_of_another_type() -> None:
    check(from_records([{"instruction": "a", "output": "b", "input": None}]), FORMATS["alpaca"], places)
    assert "field 'input' is a number" in fault("alpaca", {"instruction": "a", "output": "b", "input": 3})


def test_many_faults_fit_on_one_screen_and_are_counted() -> None:
    text = fault("text", *[{"text": None, "id": i} for i in range(50)])
    assert "place 11" in text
    assert "place 12" not in text
    assert "and 38 more" in text
