"""Masks against ids and labels written by hand, and the laws that hold for any row."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.formats import FORMATS
from lorakit.data.masking import IGNORE, Loss, Tokens, encode, opening, render_prompt, seam, segments
from lorakit.data.readers import from_records
from lorakit.errors import DataError
from tests.data.samples import (
    AB,
    ASSISTANT,
    BOS,
    ENDLESS,
    EOS,
    FORGETFUL,
    MARKED,
    MARKED_WITHOUT_END,
    NEWLINE,
    PLAIN,
    SPACE,
    SYSTEM,
    USER,
    A,
    B,
    C,
    tokenizer,
)

_ = IGNORE
PAIR = FORMATS["prompt+completion"]
CHAT = FORMATS["messages"]


def tokens(row: dict[str, Any], form: str, tok: Any, separator: str = "\n", loss: Loss = "completions") -> Tokens:
    start = opening(tok, FORMATS[form])
    return encode([segments(row, FORMATS[form], tok, separator)], tok, start, loss)[0]


def said(*turns: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, _, content in (turn.partition(": ") for turn in turns)]


def test_a_completion_and_its_end_are_trained_and_the_prompt_is_not() -> None:
    row = {"prompt": "a", "completion": "bc"}
    assert tokens(row, "prompt+completion", tokenizer()) == ([A, NEWLINE, B, C, EOS], [_, _, B, C, EOS])


def test_a_merge_never_crosses_the_seam() -> None:
    row = {"prompt": "a", "completion": "b"}
    assert tokens(row, "prompt+completion", tokenizer(), separator="") == ([A, B, EOS], [_, B, EOS])
    assert tokens({"text": "ab"}, "text", tokenizer()).ids == [AB, EOS]


def test_a_prompt_that_ends_in_whitespace_needs_no_separator() -> None:
    row = {"prompt": "a ", "completion": "b"}
    assert tokens(row, "prompt+completion", tokenizer()).ids == [A, SPACE, B, EOS]


def test_all_of_a_text_is_trained_but_its_first_token_which_nothing_predicts() -> None:
    assert tokens({"text": "cab"}, "text", tokenizer()) == ([C, AB, EOS], [_, AB, EOS])


def test_with_a_bos_every_token_of_a_text_is_trained() -> None:
    assert tokens({"text": "ca"}, "text", tokenizer(adds="<bos>")) == ([BOS, C, A, EOS], [_, C, A, EOS])


def test_loss_all_trains_the_prompt_too() -> None:
    row = {"prompt": "c", "completion": "a"}
    expected = ([BOS, C, NEWLINE, A, EOS], [_, C, NEWLINE, A, EOS])
    assert tokens(row, "prompt+completion", tokenizer(adds="<bos>"), loss="all") == expected


def test_bos_and_eos_that_the_text_already_holds_are_not_doubled() -> None:
    row = {"prompt": "<bos>a", "completion": "b<eos>"}
    expected = ([BOS, A, NEWLINE, B, EOS], [_, _, _, B, EOS])
    assert tokens(row, "prompt+completion", tokenizer(adds="<bos>")) == expected


def test_an_end_in_the_prompt_is_not_the_end_of_the_answer() -> None:
    row = {"prompt": "a<eos>", "completion": ""}
    assert tokens(row, "prompt+completion", tokenizer(), separator="") == ([A, EOS, EOS], [_, _, EOS])


def test_an_end_inside_the_text_does_not_replace_the_end_of_the_row() -> None:
    assert tokens({"text": "a<eos>b"}, "text", tokenizer()).ids == [A, EOS, B, EOS]


def test_a_tokenizer_that_adds_its_own_end_gets_one_end() -> None:
    assert tokens({"text": "c"}, "text", tokenizer(adds="<bos>...<eos>")) == ([BOS, C, EOS], [_, C, EOS])


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tok = tokenizer()
    tok.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token, so a model could never learn to stop"):
        tokens({"text": "a"}, "text", tok)


def test_alpaca_trains_the_output_and_leaves_an_empty_input_out() -> None:
    tok = tokenizer()
    row = {"instruction": "a", "input": "", "output": "b"}
    ids, labels = tokens(row, "alpaca", tok)
    assert tok.decode(ids) == "### Instruction:\na\n\n### Response:\nb<eos>"
    assert labels == [_] * (len(ids) - 2) + [B, EOS]
    assert "### Input:\nc\n" in tok.decode(tokens({**row, "input": "c"}, "alpaca", tok).ids)


def test_a_chat_without_marks_trains_what_each_answer_adds_to_its_prompt() -> None:
    row = {"messages": said("user: a", "assistant: b", "user: c", "assistant: ab")}
    assert tokens(row, "messages", tokenizer(PLAIN)) == (
        [USER, A, EOS, NEWLINE, ASSISTANT, B, EOS, NEWLINE, USER, C, EOS, NEWLINE, ASSISTANT, AB, EOS, NEWLINE],
        [_, _, _, _, _, B, EOS, NEWLINE, _, _, _, _, _, AB, EOS, NEWLINE],
    )


def test_a_chat_with_generation_marks_trains_what_they_enclose() -> None:
    row = {"messages": said("user: a", "assistant: b", "user: c", "assistant: ab")}
    assert tokens(row, "messages", tokenizer(MARKED)) == (
        [USER, A, EOS, NEWLINE, ASSISTANT, B, EOS, NEWLINE, USER, C, EOS, NEWLINE, ASSISTANT, AB, EOS, NEWLINE],
        [_, _, _, _, _, B, EOS, _, _, _, _, _, _, AB, EOS, _],
    )


def test_the_end_of_a_turn_is_trained_even_where_the_marks_leave_it_out() -> None:
    row = {"messages": said("user: a", "assistant: b")}
    assert tokens(row, "messages", tokenizer(MARKED_WITHOUT_END)) == tokens(row, "messages", tokenizer(MARKED))


def test_an_end_is_added_to_a_template_that_has_none() -> None:
    row = {"messages": said("user: a", "assistant: b")}
    assert tokens(row, "messages", tokenizer(ENDLESS)) == ([USER, A, ASSISTANT, B, EOS], [_, _, _, B, EOS])


def test_an_empty_answer_still_teaches_to_stop() -> None:
    row = {"messages": said("user: a", "assistant: ")}
    assert tokens(row, "messages", tokenizer(ENDLESS)) == ([USER, A, ASSISTANT, EOS], [_, _, _, EOS])


def test_a_conversation_that_ends_with_the_user_trains_the_answers_before() -> None:
    row = {"messages": said("user: a", "assistant: b", "user: c")}
    assert tokens(row, "messages", tokenizer(ENDLESS)).labels == [_, _, _, B, _, _]


def test_a_template_brings_its_own_bos() -> None:
    row = {"messages": said("user: a", "assistant: b")}
    assert tokens(row, "messages", tokenizer("<bos>" + PLAIN, adds="<bos>")).ids[:3] == [BOS, USER, A]


def test_sharegpt_speakers_become_chat_roles() -> None:
    shared = [{"from": "system", "value": "c"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    row = {"messages": said("system: c", "user: a", "assistant: b")}
    found = tokens({"conversations": shared}, "sharegpt", tokenizer(PLAIN))
    assert found == tokens(row, "messages", tokenizer(PLAIN))
    assert found.ids[0] == SYSTEM


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_remedy() -> None:
    row = {"messages": said("user: a", "assistant: b", "user: c", "assistant: a")}
    with pytest.raises(DataError, match=r"turn 2: .*differently once more turns follow.*\{% generation %\}"):
        tokens(row, "messages", tokenizer(FORGETFUL))


def test_a_template_that_refuses_a_conversation_is_quoted() -> None:
    template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match="the chat template refuses this conversation: no system role"):
        tokens({"messages": said("system: a", "assistant: b")}, "messages", tokenizer(template))


def test_no_template_says_how_to_give_one() -> None:
    with pytest.raises(DataError, match=r"no chat template.*set tokenizer\.chat_template"):
        tokens({"messages": said("user: a")}, "messages", tokenizer())


def test_a_null_beside_the_content_of_a_turn_is_not_shown_to_the_template() -> None:
    turns = [{**turn, "name": None} for turn in said("user: a", "assistant: b")]
    template = PLAIN.replace("{{ m.content", "{% if m.name is defined %}{{ m.name }}{% endif %}{{ m.content")
    marked = MARKED.replace("{{ m.content", "{% if m.name is defined %}{{ m.name }}{% endif %}{{ m.content")
    row = {"messages": said("user: a", "assistant: b")}
    for named, bare in ((template, PLAIN), (marked, MARKED)):
        assert tokens({"messages": turns}, "messages", tokenizer(named)) == tokens(row, "messages", tokenizer(bare))


def test_rows_with_labels_have_no_answer_to_generate() -> None:
    with pytest.raises(DataError, match="rows with labels have no answer to learn; use the classification task"):
        render_prompt({"text": "a", "label": 1}, tokenizer(), FORMATS["classification"], "")


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("a", "b"), ("a ", "b")], "\n"),
        ([("a", " b"), ("a ", "b")], ""),
        ([("a", " b"), ("a", "b")], "\n"),
        ([("", " b")], "\n"),
    ],
)
def test_one_separator_is_decided_for_the_whole_dataset(pairs: list[tuple[str, str]], expected: str) -> None:
    rows = from_records([{"prompt": prompt, "completion": completion} for prompt, completion in pairs])
    assert seam(rows, PAIR) == expected


def test_a_prompt_is_rendered_alike_from_a_row_and_by_itself() -> None:
    tok, row = tokenizer(adds="<bos>"), {"prompt": "a", "completion": "b"}
    assert render_prompt(row, tok, PAIR, "\n") == render_prompt("a", tok, PAIR, "\n") == [BOS, A, NEWLINE]
    assert render_prompt("a", tok, "text", "") == render_prompt({"text": "a"}, tok, "text", "") == [BOS, A]
    alpaca = FORMATS["alpaca"]
    assert render_prompt("a", tok, alpaca, "") == render_prompt({"instruction": "a", "output": "b"}, tok, alpaca, "")


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_a_chat_prompt_leaves_the_last_answer_out_and_asks_for_it(template: str) -> None:
    tok, turns = tokenizer(template), said("user: a", "assistant: b")
    assert render_prompt(turns, tok, CHAT, "") == [USER, A, EOS, NEWLINE, ASSISTANT]
    assert render_prompt({"messages": turns}, tok, CHAT, "") == render_prompt("a", tok, CHAT, "")


def test_a_prompt_of_the_wrong_shape_is_named() -> None:
    with pytest.raises(DataError, match="a row with the field 'prompt', got {'prmpt': 'a'}"):
        render_prompt({"prmpt": "a"}, tokenizer(), PAIR, "")
    with pytest.raises(DataError, match="a row with the field 'messages'"):
        render_prompt({"prompt": "a"}, tokenizer(PLAIN), CHAT, "")


BARE = tokenizer()
TEXT = st.text(st.characters(codec="utf-8"), max_size=12)


@given(prompt=TEXT, completion=TEXT, separator=st.sampled_from(["\n", " -> "]))
def test_what_is_trained_decodes_to_the_completion_and_its_end(prompt: str, completion: str, separator: str) -> None:
    tok, row = BARE, {"prompt": prompt, "completion": completion}
    ids, labels = tokens(row, "prompt+completion", tok, separator)
    trained = [label for label in labels if label != IGNORE]
    assert tok.decode(trained) == completion + "<eos>"
    assert render_prompt(row, tok, PAIR, separator) + trained == ids


TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3)
ENDS = {tokenizer(PLAIN): "<eos>\n", tokenizer(MARKED): "<eos>", tokenizer(MARKED_WITHOUT_END): "<eos>"}


@given(turns=TURNS, tok=st.sampled_from(list(ENDS)))
def test_every_answer_is_trained_and_each_prompt_is_the_beginning_of_training(
    turns: list[tuple[str, str]], tok: Any
) -> None:
    messages = [m for asked, answer in turns for m in said(f"user: {asked}", f"assistant: {answer}")]
    ids, labels = tokens({"messages": messages}, "messages", tok)
    trained = [label for label in labels if label != IGNORE]
    assert tok.decode(trained) == "".join(answer + ENDS[tok] for _, answer in turns)
    for count in range(2, len(messages) + 1, 2):
        prompt = render_prompt(messages[:count], tok, CHAT, "")
        assert ids[: len(prompt)] == prompt
