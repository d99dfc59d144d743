"""`lorakit generate`: the model answers; a prompt is rendered exactly as it was in training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.screen import printable, screen
from lorakit.cli.sources import BASE_HELP, SOURCE_HELP, Source, find, refuse_classifier
from lorakit.errors import DataError, RecipeError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorakit.data import Format
    from lorakit.data.formats import Value

_FORMATS = "text, prompt+completion, messages, alpaca or sharegpt"  # importing them would slow every --help


def generate(
    source: Annotated[str, typer.Argument(help=SOURCE_HELP)],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given more than once.")] = None,
    prompts: Annotated[str | None, typer.Option(help="A file of prompts, in the format of the training data.")] = None,
    base: Annotated[str | None, typer.Option(help=BASE_HELP)] = None,
    format: Annotated[
        str | None,
        typer.Option(help=f"How prompts are read where no adapter says it: {_FORMATS}; text by default."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="An answer ends here at the latest.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="The seed of the draws, where --temperature is above 0.")
    ] = 0,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Prompts answered at once; more is faster and takes more memory.")
    ] = 16,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write answers to prompts."""
    with screen(json) as out:
        if bool(prompt) == bool(prompts):
            raise RecipeError("give --prompt TEXT or --prompts FILE.jsonl, one of the two")
        from lorakit.inject.attach import attach
        from lorakit.training.generate import generate as answers_of

        found = find(source, base)
        refuse_classifier(source, found.labels)
        form = _format(found, source, format)
        rows: list[Any] = list(prompt) if prompt else _rows(str(prompts))
        model, tokenizer = found.load_base()
        if found.state is not None:
            attach(model, found.state)
        ids = _rendered(rows, tokenizer, form, found, prompts)
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


def _format(found: Source, source: str, given: str | None) -> Format:
    """Return how prompts are read: as the adapter remembers, else as `--format` says, else as plain text.

    Raises:
        DataError: an unknown format, or another one than the adapter was trained on.
    """
    from lorakit.data import FORMATS

    if given is not None and given not in FORMATS:
        raise DataError(f"unknown format {given!r}{did_you_mean(given, FORMATS)}; one of {', '.join(FORMATS)}")
    own = found.purpose.format if found.purpose is not None else None
    if own is not None and given not in (None, own):
        raise RecipeError(f"{source} was trained on rows of the format {own}, not {given}; leave --format out")
    return FORMATS[own or given or "text"]


def _rendered(
    rows: list[Any], tokenizer: PreTrainedTokenizerBase, form: Format, found: Source, file: str | None
) -> list[list[int]]:
    """Return the token ids of each prompt, as training would have made them; a bad one is named by its place."""
    from lorakit.data import render_prompt
    from lorakit.data.formats import at_rows
    from lorakit.data.readers import locate

    separator, asks = found.data.separator or "", next(iter(form.needs.items()))
    made: list[list[int]] = []
    faults: dict[int, str] = {}
    for number, row in enumerate(rows):
        try:
            made.append(render_prompt(_checked(row, *asks), tokenizer, form, separator))
        except DataError as fault:
            faults[number] = str(fault)
    if faults:
        where = [f"--prompt {number + 1}" for number in range(len(rows))]
        places = (lambda numbers: locate(file, None, numbers)) if file else (lambda n: [where[i] for i in n])
        raise DataError(f"prompts that cannot be read as {form.name}:\n{at_rows(faults, places)}")
    return made


def _checked(row: Any, name: str, value: Value) -> Any:
    """Return a row whose prompt is what the format says, or raise `DataError`."""
    if isinstance(row, str):
        try:
            row.encode()
        except UnicodeEncodeError:
            raise DataError("is not UTF-8 text") from None
        return row
    if row.get(name) is None:
        known = ", ".join(map(repr, row))
        raise DataError(f"field '{name}' is missing or null, expected {value.says}; found {known}")
    if complaint := value.complaint(row[name]):
        raise DataError(f"field '{name}' {complaint}")
    return row
