"""A preview shows what is trained, by colour or by brackets, and loses no character."""

from __future__ import annotations

from lorakit.data import PackRule, prepare, prepare_classification, preview
from lorakit.data.preview import example, plain, runs
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
    assert plain(example(PREPARED, tokenizer())) == "<bos>né\n[[日本<eos>]]"


def test_of_a_packed_row_the_first_example_alone_is_shown() -> None:
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(3)]
    packed = prepare(rows, tokenizer(), max_length=64, packing=PackRule(64))
    assert len(packed.dataset) == 1
    assert plain(example(packed, tokenizer())) in [f"p{i}\n[[c{i}<eos>]]" for i in range(3)]


def test_of_a_shared_prompt_one_answer_is_shown() -> None:
    rows = [{"prompt": "why", "completion": f"c{i}"} for i in range(3)]
    packed = prepare(rows, tokenizer(), max_length=64, packing=PackRule(64, share=-1.0))
    assert packed.report.tokens_shared == 6
    assert plain(example(packed, tokenizer())) == "why\n[[c0<eos>]]"


def test_a_classifier_s_class_comes_after_its_text() -> None:
    rows = [{"text": "good", "label": "yes"}, {"text": "bad", "label": "no"}]
    labelled = prepare_classification(rows, tokenizer(), max_length=64)
    assert plain(example(labelled, tokenizer(), 1)).endswith("bad[[ no]]")


def test_characters_of_several_tokens_stay_whole() -> None:
    row = PREPARED.dataset[0]
    assert len(row["input_ids"]) > len("né\n日本") + 2
    assert [run.text for run in runs(row["input_ids"], row["labels"], tokenizer())] == [
        "<bos>",
        "né\n",
        "日本",
        "<eos>",
    ]
