"""`lorakit generate`: the model answers; a prompt is rendered exactly as it was in training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.screen import printable, screen
from lorakit.cli.sources import BASE_HELP, SOURCE_HELP, Source, find
from lorakit.errors import DataError, RecipeError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generate(
    source: Annotated[str, typer.Argument(help=SOURCE_HELP)],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given more than once.")] = None,
    prompts: Annotated[str | None, typer.Option(help="A file of prompts, in the format of the training data.")] = None,
    base: Annotated[str | None, typer.Option(help=BASE_HELP)] = None,
    format: Annotated[
        str | None,
        typer.Option(help="How to read prompts where no run says it: text, messages, ..."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="An answer ends here at the latest.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the draws, where --temperature is above 0.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 16,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write answers to prompts."""
    with screen(json) as out:
        if bool(prompt) == bool(prompts):
            raise RecipeError("give --prompt TEXT or --prompts FILE.jsonl, one of the two")
        from lorakit.inject.attach import attach
        from lorakit.training.generate import generate as answers_of

        found = find(source, base)
        if found.labels:
            raise RecipeError(f"{source} is a classifier, which writes no answers; score it: lorakit evaluate {source}")
        rows: list[Any] = list(prompt) if prompt else _rows(str(prompts))
        model, tokenizer = found.load_base()
        if found.state is not None:
            attach(model, found.state)
        ids = _rendered(rows, tokenizer, found, format)
        answers = answers_of(model, tokenizer, ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
                             batch_size=batch_size)  # fmt: skip
        for answer in answers:
            out.say(printable(answer.strip()))
        shown = [tokenizer.decode(each) for each in ids]
        out.result(
            {
                "base": found.base,
                "adapter": None if found.state is None else source,
                "answers": [{"prompt": p, "answer": a} for p, a in zip(shown, answers, strict=True)],
            }
        )


def _rows(file: str) -> list[Any]:
    from lorakit.data import read_rows

    return list(read_rows(file))


def _rendered(
    rows: list[Any], tokenizer: PreTrainedTokenizerBase, found: Source, format: str | None
) -> list[list[int]]:
    """Return the token ids of each prompt, as training would have made them."""
    from lorakit.data import FORMATS, render_prompt

    name = format or (found.purpose.format if found.purpose is not None else "text")
    if name not in FORMATS:
        raise DataError(f"unknown format {name!r}{did_you_mean(name, FORMATS)}; one of {', '.join(FORMATS)}")
    separator = found.data.separator
    return [render_prompt(row, tokenizer, FORMATS[name], "" if separator is None else separator) for row in rows]
