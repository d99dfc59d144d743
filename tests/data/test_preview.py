"""A preview shows what is trained, by colour or by brackets, and loses no character."""

from __future__ import annotations

from lorakit.data import prepare, preview
from lorakit.data.preview import plain, runs
from tests.data.samples import tokenizer

PREPARED = prepare([{"prompt": "<bos>né", "completion": "日本"}], tokenizer(), max_length=64)


def test_trained_text_is_green_context_dim_and_special_tokens_reversed() -> None:
    text = preview(PREPARED, tokenizer())
    styles = [(text.plain[span.start : span.end], span.style) for span in text.spans]
    assert styles == [
        ("<bos>", "dim reverse"),
        ("né\n", "dim"),
        ("日本", "bold green"),
        ("<eos>", "bold green reverse"),
    ]


def test_without_colour_brackets_mark_what_is_trained() -> None:
    row = PREPARED.dataset[0]
    assert plain(row["input_ids"], row["labels"], tokenizer()) == "<bos>né\n[[日本<eos>]]"


def test_characters_of_several_tokens_stay_whole() -> None:
    row = PREPARED.dataset[0]
    assert len(row["input_ids"]) > len("né\n日本") + 2
    assert [run.text for run in runs(row["input_ids"], row["labels"], tokenizer())] == [
        "<bos>",
        "né\n",
        "日本",
        "<eos>",
    ]
