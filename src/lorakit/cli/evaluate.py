"""`lorakit evaluate`: the adapted model's score on rows it has not seen, beside the bare base's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.screen import Screen, screen, table
from lorakit.cli.sources import BASE_HELP, SOURCE_HELP, find
from lorakit.errors import DataError

if TYPE_CHECKING:
    from lorakit.training.evaluate import Evaluation


def evaluate(
    source: Annotated[str, typer.Argument(help=SOURCE_HELP)],
    data: Annotated[str | None, typer.Option(help="Rows to score; a run's validation data by default.")] = None,
    split: Annotated[str | None, typer.Option(help="Which split of a folder or a dataset.")] = None,
    base: Annotated[str | None, typer.Option(help=BASE_HELP)] = None,
    compare: Annotated[bool, typer.Option("--compare/--no-compare", help="Score the bare base as well.")] = True,
    bleu: Annotated[bool, typer.Option("--bleu", help="Also generate answers and compare them (sacrebleu).")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Rows scored at once; more is faster and takes more memory.")
    ] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of each answer generated for BLEU.")] = 128,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score a model on a file of rows, before and after."""
    with screen(json) as out:
        from lorakit.data.readers import check_there
        from lorakit.inject.attach import attach
        from lorakit.training.evaluate import evaluate as score

        found = find(source, base)
        section = found.data
        rows, part = (data, split) if data else (section.validation, split or section.validation_split)
        if rows is None:
            raise DataError(f"{source} names no validation data; give some with --data FILE")
        check_there(rows, part)  # before a large base is loaded for nothing
        model, tokenizer = found.load_base()
        headless = found.state is not None and bool(found.labels)  # the base's head would be random
        scores: dict[str, Evaluation] = {}
        for name in ("before", "after"):
            if name == "before" and found.state is not None and (headless or not compare):
                continue
            if name == "after":
                if found.state is None:
                    break
                attach(model, found.state)
            out.note(f"scoring {'the base' if name == 'before' else source} on {rows} ...")
            scores[name] = score(model, tokenizer, rows, section, split=part, batch_size=batch_size, bleu=bleu,
                                 max_new_tokens=max_new_tokens, limit=limit)  # fmt: skip
        if headless and compare:
            out.note("the base has no trained head for these labels, so there is no score before")
        _show(out, scores)
        out.result({"source": source, "base": found.base, "data": rows, **_plain(scores)})


def _show(out: Screen, scores: dict[str, Evaluation]) -> None:
    """Draw one row a measure, one column a model."""
    first = next(iter(scores.values()))
    out.say("", *first.report.lines())
    rows = []
    for label, field, pattern in (
        ("loss (nats a token)" if first.task == "causal-lm" else "loss (nats a row)", "loss", "{:.4f}"),
        ("perplexity", "perplexity", "{:.3f}"),
        ("BLEU", "bleu", "{:.2f}"),
        ("accuracy", "accuracy", "{:.2%}"),
    ):
        values = [getattr(one, field) for one in scores.values()]
        if values[0] is not None:
            rows.append((label, *(pattern.format(value) for value in values)))
    alone = {"before": "base", "after": "adapted"}
    columns = list(scores) if len(scores) > 1 else [alone[name] for name in scores]
    out.show(table("", "", *columns, rows=rows, numbers=range(1, 3)))
    if first.classes:
        last = list(scores.values())[-1]
        counts = [(n, f"{c.rows:,}", f"{c.predicted:,}", f"{c.correct:,}") for n, c in last.classes.items()]
        out.show(table("", "class", "rows", "predicted", "correct", rows=counts, numbers=(1, 2, 3)))


def _plain(scores: dict[str, Evaluation]) -> dict[str, object]:
    return {name: one.to_json() for name, one in scores.items()}
