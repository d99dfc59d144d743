"""Scores: what they are the mean of, and that no batch or limit bends them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from lorakit.errors import DataError
from lorakit.training.base import load_base
from lorakit.training.evaluate import corpus_bleu, evaluate
from lorakit.training.recipe import DataSection
from tests.data.samples import PLAIN
from tests.training.samples import labelled, pairs, write_rows


def test_the_loss_is_per_completion_token(base: Path, tmp_path: Path) -> None:
    model, tokenizer = load_base(str(base))
    source = write_rows(tmp_path / "rows.jsonl", pairs(10))
    scored = evaluate(model, tokenizer, source, DataSection(max_length=64), batch_size=3)
    total, count = 0.0, 0
    for row in pairs(10):
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        total -= sum(float(logs[len(prompt) + i - 1, token]) for i, token in enumerate(answer))
        count += len(answer)
    assert scored.count == count
    assert scored.loss == pytest.approx(total / count, rel=1e-5)
    assert scored.perplexity == pytest.approx(math.exp(scored.loss))
    json.dumps(scored.to_json())


def test_a_limit_takes_the_first_rows(base: Path, tmp_path: Path) -> None:
    model, tokenizer = load_base(str(base))
    whole = write_rows(tmp_path / "rows.jsonl", pairs(10))
    first = write_rows(tmp_path / "first.jsonl", pairs(4))
    data = DataSection(max_length=64)
    limited = evaluate(model, tokenizer, whole, data, limit=4)
    assert limited.loss == evaluate(model, tokenizer, first, data).loss
    assert (limited.rows, limited.report.source) == (4, whole)


def test_bleu_compares_one_answer_with_all_references_of_its_prompt(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_base(str(base))
    rows = [
        {"prompt": "x\n", "completion": "a cab is in the bad bed ."},
        {"prompt": "x\n", "completion": "the bad bed has a cab ."},
        {"prompt": "y\n", "completion": "a cafe face ."},
    ]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    asked: list[list[list[int]]] = []

    def say(model: object, tokenizer: object, prompts: list[list[int]], **_: object) -> list[str]:
        asked.append(prompts)
        return [" the bad bed has a cab .", " a cafe face ."]

    monkeypatch.setattr("lorakit.training.evaluate.generate", say)
    scored = evaluate(model, tokenizer, source, DataSection(), bleu=True)
    assert [len(prompts) for prompts in asked] == [2]
    assert (scored.bleu, scored.prompts) == (pytest.approx(100.0), 2)


def test_bleu_is_that_of_sacrebleu() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    answers = ["the cat sat on the mat", "a dog barked at the small red fox"]
    references = [
        ["the cat is on the mat", "there is a cat on the mat"],
        ["a dog barked at the red fox", "a dog barks"],
    ]
    expected = sacrebleu.corpus_bleu(answers, [[r[i] for r in references] for i in range(2)]).score
    assert corpus_bleu(answers, references) == pytest.approx(expected)
    assert corpus_bleu(answers, [references[0], references[1][:1]]) == pytest.approx(
        sacrebleu.corpus_bleu(answers, [[r[0] for r in references], [references[0][1], None]]).score
    )


def test_bleu_of_plain_text_is_refused(base: Path, tmp_path: Path) -> None:
    model, tokenizer = load_base(str(base))
    source = write_rows(tmp_path / "rows.jsonl", [{"text": "a cab"}])
    with pytest.raises(DataError, match="BLEU compares answers to prompts"):
        evaluate(model, tokenizer, source, DataSection(), bleu=True)


def test_a_classifier_is_counted_class_by_class(encoder: Path, tmp_path: Path) -> None:
    labels = ("high", "low")
    model, tokenizer = load_base(str(encoder), task="classification", labels=labels)
    source = write_rows(tmp_path / "rows.jsonl", labelled(30))
    scored = evaluate(model, tokenizer, source, DataSection(), batch_size=7)
    assert scored.classes.keys() == set(labels)
    assert sum(counts.rows for counts in scored.classes.values()) == scored.count == 30
    assert sum(counts.predicted for counts in scored.classes.values()) == 30
    correct = 0
    for row in labelled(30):
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], return_tensors="pt")).logits[0]
        correct += labels[int(logits.argmax())] == row["label"]
    assert scored.accuracy == pytest.approx(correct / 30)


def test_rows_of_another_task_than_the_models_are_refused(base: Path, encoder: Path, tmp_path: Path) -> None:
    with_labels = write_rows(tmp_path / "labelled.jsonl", labelled(4))
    without = write_rows(tmp_path / "pairs.jsonl", pairs(4))
    with pytest.raises(DataError, match="holds labelled rows .* this model continues text; name the adapter"):
        evaluate(*load_base(str(base)), with_labels, DataSection())
    classifier, tokenizer = load_base(str(encoder), task="classification", labels=("high", "low"))
    with pytest.raises(DataError, match=r"rows of the format 'prompt\+completion', and this model classifies"):
        evaluate(classifier, tokenizer, without, DataSection())


def test_bleu_of_a_conversation_without_a_last_answer_is_refused(base: Path, tmp_path: Path) -> None:
    model, tokenizer = load_base(str(base))
    tokenizer.chat_template = PLAIN
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    source = write_rows(tmp_path / "rows.jsonl", [{"messages": turns[:2]}, {"messages": turns}])
    with pytest.raises(DataError, match="another speaker than the assistant(.|\n)*- row 2$"):
        evaluate(model, tokenizer, source, DataSection(), bleu=True)
