from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.serving.text import Writer

TALES = Path(__file__).parents[2] / "src" / "lorakit" / "assets" / "tales"
NAMES = ("tales", "bytes", "words")


@cache
def tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if name == "tales":
        return AutoTokenizer.from_pretrained(TALES)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if name == "bytes":  # one token a byte
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        made.decoder = decoders.ByteLevel()
    else:  # sentencepiece's way: a word's space belongs to it, and the first word has none
        made = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "s": 2, "▁": 3, "é": 4}, "▁one"))
        made.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def size(name: str) -> int:
    return len(tokenizer(name))


def written(name: str, ids: Sequence[int], stops: Sequence[str] = ()) -> tuple[str, bool]:
    writer = Writer(tokenizer(name), stops)
    text = "".join([writer.push(i) for i in ids])
    return text + writer.flush(), writer.stopped


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The plain twin: the stop that is complete first cuts, of those that end together the longest."""
    found = [(at + len(s), at) for s in stops for at in range(len(text)) if text.startswith(s, at)]
    return (text[: min(found)[1]], True) if found else (text, False)


def whole(name: str, ids: Sequence[int]) -> str:
    return str(tokenizer(name).decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_the_pieces_are_the_whole_cut_at_the_first_stop(name: str, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, size(name) - 1), max_size=60))
    text = whole(name, ids)
    part = st.tuples(st.integers(0, 60), st.integers(1, 4)).map(lambda p: text[p[0] : p[0] + p[1]]).filter(bool)
    likely = [part] if text else []
    stops = data.draw(st.lists(st.one_of(*likely, st.text("ab ", min_size=1, max_size=3)), max_size=3))
    assert written(name, ids, stops) == cut(text, stops)


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_text_of_any_script_comes_back_from_its_bytes(text: str, stops: list[str]) -> None:
    alphabet = tokenizer("bytes")
    ids = [alphabet.convert_tokens_to_ids(c) for c in _byte_level(text)]
    assert written("bytes", ids, stops) == cut(text, stops)


def _byte_level(text: str) -> str:
    from tokenizers import pre_tokenizers

    return "".join(
        p for p, _ in pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    )


def test_half_a_character_waits_for_its_other_half() -> None:
    bytes_of = tokenizer("bytes").convert_tokens_to_ids(list(_byte_level("a가b")))
    writer = Writer(tokenizer("bytes"))
    assert [writer.push(i) for i in bytes_of] == ["a", "", "", "가", "b"]


def test_the_beginning_of_a_stop_string_waits_and_comes_out_when_it_was_none() -> None:
    ids = tokenizer("bytes").convert_tokens_to_ids(list("ab.ab!"))
    writer = Writer(tokenizer("bytes"), ["b!"])
    assert [writer.push(i) for i in ids] == ["a", "", "b.", "a", "", ""]
    assert writer.stopped
    assert writer.flush() == ""


def test_nothing_is_written_after_a_stop() -> None:
    ids = tokenizer("bytes").convert_tokens_to_ids(list("a.b"))
    assert written("bytes", ids, ["."]) == ("a", True)


def test_of_overlapping_stops_the_one_complete_first_cuts() -> None:
    ids = tokenizer("bytes").convert_tokens_to_ids(list("xabc"))
    assert written("bytes", ids, ["abc", "b"]) == ("xa", True)
    assert written("bytes", ids, ["bc", "abc"]) == ("x", True)


def test_a_stop_string_that_begins_again_inside_itself_is_found() -> None:
    ids = tokenizer("bytes").convert_tokens_to_ids(list("ababac"))
    assert written("bytes", ids, ["abac"]) == ("ab", True)


def test_special_tokens_are_not_written() -> None:
    end = tokenizer("tales").eos_token_id
    ids = tokenizer("tales")("Hi there")["input_ids"]
    assert written("tales", [*ids, end]) == ("Hi there", False)


@pytest.mark.parametrize("characters", ["\xe4" * 600, "ab" * 300, "\xbd" * 600], ids=["halves", "letters", "strays"])
def test_a_late_token_costs_what_an_early_one_does(characters: str, monkeypatch: pytest.MonkeyPatch) -> None:
    coder = tokenizer("bytes")
    ids = coder.convert_tokens_to_ids(list(characters))
    lengths: list[int] = []
    decode = coder.decode

    def counted(ids: Sequence[int], **how: Any) -> Any:
        lengths.append(len(ids))
        return decode(ids, **how)

    writer = Writer(coder)
    monkeypatch.setattr(coder, "decode", counted)
    pieces = []
    worst = []
    for one in ids:
        lengths.clear()
        pieces.append(writer.push(one))
        worst.append(sum(lengths))
    assert max(worst) < 300, "about sixteen tokens a few times, not all six hundred"
    assert len("".join([*pieces, writer.flush()])) == 600
