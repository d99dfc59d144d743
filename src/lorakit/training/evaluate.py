"""How good a model is on a file of rows: loss and perplexity per completion token, BLEU, accuracy per class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from lorakit.core.lazy import need
from lorakit.core.modes import evaluating
from lorakit.data import DataReport, Format, Prepared, detect, read_rows, render_prompt
from lorakit.data.formats import SPEAKERS, named
from lorakit.errors import DataError, listing
from lorakit.training.base import quiet
from lorakit.training.generate import generate, refuse_nan
from lorakit.training.loss import batches, logits_of, mean_loss, summed_loss
from lorakit.training.stage import longest_row, prepare_labelled, prepare_text, rows_of, task_named

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorakit.training.recipe import DataSection


@dataclass(frozen=True)
class ClassCounts:
    """Of one class: rows that have it, rows predicted to have it, and rows where both agree."""

    rows: int
    predicted: int
    correct: int


@dataclass(frozen=True)
class Evaluation:
    """What a model scored: `loss` in nats per trained token (`count` of them), or per row for a classifier."""

    task: str
    loss: float
    count: int
    rows: int
    report: DataReport
    perplexity: float | None = None
    bleu: float | None = None
    prompts: int | None = None
    accuracy: float | None = None
    classes: Mapping[str, ClassCounts] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    data: DataSection,
    *,
    split: str | None = None,
    batch_size: int = 16,
    bleu: bool = False,
    max_new_tokens: int = 128,
    limit: int | None = None,
) -> Evaluation:
    """Score a model, with the adapters active on it, on the rows of `source`.

    Args:
        model: a language model, or a classifier whose config names its classes.
        tokenizer: of the model.
        source: a file, a folder or a dataset's name, in the format of the training data.
        data: the recipe's section; take the one in the run's folder, whose separator and labels are decided.
        split: of a folder or a dataset.
        batch_size: rows at once; no score depends on it beyond rounding.
        bleu: also generate, greedily, and compare with all references of each prompt (sacrebleu, 0 to 100).
        max_new_tokens: of each generated answer.
        limit: only the first rows.

    Raises:
        DataError: rows that cannot be read, of another format than the model's task, or without prompts for BLEU.
        LorakitError: logits that are NaN.
    """
    with quiet():
        rows = read_rows(source, split)
        rows = rows.select(range(min(limit, len(rows)))) if limit is not None else rows
        form = detect(rows) if data.format == "auto" else named(data.format, rows)
        given = source if limit is None else rows
        _refuse_other_task(model, form, source)
        if form.name == "classification":
            return _classifier(model, tokenizer, given, source, data, split, batch_size)
        most = longest_row(data, model, tokenizer)
        prepared = prepare_text(data, tokenizer, model, given, split, most=most, separator=data.separator)
        loss, count = mean_loss(model, prepared.dataset, batch_size, _pad(tokenizer))
        refuse_nan(math.isnan(loss))
        report = replace(prepared.report, source=source)
        scored = Evaluation("causal-lm", loss, count, report.kept, report, perplexity=math.exp(min(loss, 700.0)))
        if bleu:
            score, prompts = _bleu(model, tokenizer, rows, form, report.separator_used, max_new_tokens, batch_size)
            scored = replace(scored, bleu=score, prompts=prompts)
        return scored


def _refuse_other_task(model: PreTrainedModel, form: Format, source: str) -> None:
    """Raise `DataError` for labelled rows and a model that writes, or rows to be continued and one that classifies."""
    writes = bool(model.can_generate())
    if writes and task_named(form.name) == "classification":
        raise DataError(
            f"{source} holds labelled rows (text, label), and this model continues text; name the adapter or the run "
            "of a classifier, or leave the labels out to score the texts alone"
        )
    if not writes and task_named(form.name) != "classification":
        raise DataError(
            f"{source} holds rows of the format '{form.name}', and this model classifies; give rows with text and "
            "label, or name the adapter or the run of a language model"
        )


def _classifier(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    given: str | Dataset,
    source: str,
    data: DataSection,
    split: str | None,
    batch_size: int,
) -> Evaluation:
    config: Any = model.config
    names = data.labels or tuple(str(config.id2label[i]) for i in range(config.num_labels))
    most = longest_row(data, model, tokenizer)
    prepared: Prepared = prepare_labelled(
        data, tokenizer, given, split, most=most, labels=names, vocab_size=rows_of(model)
    )
    loss, actual, predicted = _predictions(model, prepared.dataset, batch_size, _pad(tokenizer))
    refuse_nan(math.isnan(loss))
    classes = {
        name: ClassCounts(
            rows=int((actual == i).sum()),
            predicted=int((predicted == i).sum()),
            correct=int(((actual == i) & (predicted == i)).sum()),
        )
        for i, name in enumerate(names)
    }
    accuracy = float((actual == predicted).double().mean())
    report = replace(prepared.report, source=source)
    return Evaluation("classification", loss, len(actual), report.kept, report, accuracy=accuracy, classes=classes)


@torch.no_grad()
def _predictions(model: Any, rows: Dataset, batch_size: int, pad_id: int) -> tuple[float, torch.Tensor, torch.Tensor]:
    total, actual, predicted = 0.0, [], []
    with evaluating(model):
        for batch in batches(rows, batch_size, pad_id, model.device, by_length=True):
            labels = batch.pop("labels")
            logits = logits_of(model, batch, labels)
            total += float(summed_loss(logits, labels)[0])
            actual.append(labels.cpu())
            predicted.append(logits.argmax(-1).cpu())
    return total / len(rows), torch.cat(actual), torch.cat(predicted)


def _bleu(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    form: Format,
    separator: str,
    max_new_tokens: int,
    batch_size: int,
) -> tuple[float, int]:
    """Return corpus BLEU and the number of prompts: rows with the same prompt are references of one answer."""
    if form.name == "text":
        raise DataError("BLEU compares answers to prompts, and these rows are plain text; leave bleu out")
    if open_ended := [f"row {number}" for number, row in enumerate(rows, 1) if not _is_answered(row, form)]:
        raise DataError(
            "BLEU compares the last answer of a conversation, and these end with another speaker than the assistant; "
            f"cut them there, or leave bleu out:\n{listing(open_ended)}"
        )
    references: dict[tuple[int, ...], list[str]] = {}
    for row in rows:
        references.setdefault(tuple(render_prompt(row, tokenizer, form, separator)), []).append(_answer(row, form))
    answers = generate(model, tokenizer, list(references), max_new_tokens=max_new_tokens, batch_size=batch_size)
    return corpus_bleu(answers, list(references.values())), len(references)


def corpus_bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return sacrebleu's corpus BLEU (13a tokens, 0 to 100); an answer may have any number of references."""
    most = max(map(len, references))
    columns = [[group[i].strip() if i < len(group) else None for group in references] for i in range(most)]
    scored = need("sacrebleu", "train").corpus_bleu([answer.strip() for answer in answers], columns)
    return float(scored.score)


def _is_answered(row: Mapping[str, Any], form: Format) -> bool:
    match form.name:
        case "messages":
            return bool(row["messages"][-1]["role"] == "assistant")
        case "sharegpt":
            return SPEAKERS[row["conversations"][-1]["from"]] == "assistant"
        case _:
            return True


def _answer(row: Mapping[str, Any], form: Format) -> str:
    match form.name:
        case "prompt+completion":
            return str(row["completion"])
        case "alpaca":
            return str(row["output"])
        case "messages":
            return str(row["messages"][-1]["content"])
        case _:
            return str(row["conversations"][-1]["value"])


def _pad(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.pad_token_id)
