"""Token ids and labels of a row, masked by construction.

A row becomes segments, each known to be trained or not before any token exists; every segment is tokenised on its own
and the ids are concatenated. Nothing is ever searched for in the ids, so no template or merge can shift the mask, and
a prompt rendered for inference is made of the same segments as the one seen in training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lorakit.core.lazy import need
from lorakit.data.formats import FORMATS, SPEAKERS, Format
from lorakit.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
"""The label that torch's cross-entropy leaves out."""

Loss = Literal["completions", "all"]
Row = Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]


class Segment(NamedTuple):
    """A piece of a row: text to tokenise, or ids that are already tokens (BOS, EOS)."""

    text: str | tuple[int, ...]
    trained: bool


class Tokens(NamedTuple):
    """Ids `(length,)` and labels `(length,)`: the id where it is trained, `IGNORE` where not."""

    ids: list[int]
    labels: list[int]


def segments(row: Row, form: Format, tokenizer: PreTrainedTokenizerBase, separator: str) -> list[Segment]:
    """Cut a row into trained and untrained segments, its end-of-sequence token included, `opening` not."""
    eos = Segment((tokenizer.eos_token_id,), True)
    match form.name:
        case "text":
            return [Segment(row["text"], True), eos]
        case "prompt+completion" | "alpaca":
            prompt, completion = _pair(row, form, separator)
            return [Segment(prompt, False), Segment(completion, True), eos]
        case _:
            turns = _chat(_messages(row, form), tokenizer)
            unended = [t for t in turns[-1:] if t.trained and str(tokenizer.eos_token) not in t.text]
            return [*turns, eos] if unended else turns


def opening(tokenizer: PreTrainedTokenizerBase, form: Format) -> list[int]:
    """Return the ids before a row's text: what the tokenizer itself puts there, or nothing where a template does it.

    Raises `DataError` for a format without an answer, and for a tokenizer without an end or a template it needs.
    """
    if form.name == "classification":
        raise DataError(
            "rows with labels have no answer to learn; use the classification task, or choose format 'text'"
        )
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-sequence token, so a model could never learn to stop; set eos_token"
        )
    if form.name in ("messages", "sharegpt"):
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template, so messages cannot be rendered; set tokenizer.chat_template (a "
                "Jinja string), use a chat model's tokenizer, or turn the rows into prompt and completion"
            )
        return []
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return list(full[: next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)])


def encode(
    batch: Sequence[Sequence[Segment]], tokenizer: PreTrainedTokenizerBase, start: Sequence[int], loss: Loss
) -> list[Tokens]:
    """Tokenise each segment on its own and concatenate after `start`; `loss="all"` trains every segment.

    The first token has no context to be predicted from, so it never carries loss: counts stay true, and in a packed
    row no example predicts the beginning of the next.
    """
    texts = [segment.text for row in batch for segment in row if isinstance(segment.text, str)]
    ids_of = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])
    encoded = []
    for row in batch:
        ids, trained = list(start), [False] * len(start)
        for segment in row:
            is_text = isinstance(segment.text, str)
            new = list(next(ids_of) if is_text else segment.text)
            if ids[-1:] == new[:1] != [] and (ids == start if is_text else trained[-1]):
                del new[0]  # the text brought its own BOS or EOS
            ids += new
            trained += [segment.trained or loss == "all"] * len(new)
        labels = [token if learn else IGNORE for token, learn in zip(ids, trained, strict=True)]
        encoded.append(Tokens(ids, [IGNORE, *labels[1:]] if labels else labels))
    return encoded


def render_prompt(
    row: Row | str | Messages, tokenizer: PreTrainedTokenizerBase, format: Format | str, separator: str
) -> list[int]:
    """Return the ids a model is given before it answers: the untrained beginning of the same row in training.

    `row` is a dataset row (its answer, if any, is left out), the prompt alone, or the messages so far. `format` and
    `separator` are `DataReport.format` and `DataReport.separator_used` of the training data.
    """
    form = FORMATS[format] if isinstance(format, str) else format
    start = opening(tokenizer, form)
    return encode([prompt_segments(row, tokenizer, form, separator)], tokenizer, start, "completions")[0].ids


def prompt_segments(
    row: Row | str | Messages, tokenizer: PreTrainedTokenizerBase, form: Format, separator: str
) -> list[Segment]:
    """Cut what a model is given before it answers as the row in training is cut; see `render_prompt`."""
    key = next(iter(form.needs))  # the column a prompt stands in
    match form.name:
        case "text":
            return [Segment(row if isinstance(row, str) else _checked(row, key)[key], False)]
        case "prompt+completion" | "alpaca":
            prompt, _ = _pair({key: row} if isinstance(row, str) else _checked(row, key), form, separator)
            return [Segment(prompt, False)]
        case _:
            if isinstance(row, str):
                row = [{"role": "user", "content": row}]
            messages = _messages(_checked(row, key), form) if isinstance(row, Mapping) else row
            answered = bool(messages) and messages[-1]["role"] == "assistant"
            return _chat(messages[:-1] if answered else messages, tokenizer, answer_next=True)


def seam(rows: Dataset, form: Format, separator: str | None = None) -> str:
    """Return what stands between prompt and completion: `separator` if given, else a newline, or nothing where every
    row with a completion has whitespace at the seam.

    One decision for the whole dataset, because at inference the completion is not there to be looked at. An empty
    prompt needs a separator too, for a model must be given something.
    """
    if form.name != "prompt+completion":
        return ""
    if separator is not None:
        return separator
    pairs = list(zip(rows["prompt"], rows["completion"], strict=True))
    pairs = [pair for pair in pairs if pair[1]] or pairs
    return "\n" if any(not p or not (p[-1:].isspace() or c[:1].isspace()) for p, c in pairs) else ""


def _checked(row: Row | Messages, key: str) -> Row:
    if not isinstance(row, Mapping) or row.get(key) is None:
        raise DataError(f"expected a prompt or a row with the field '{key}', got {str(row)[:80]}")
    return row


def _pair(row: Row, form: Format, separator: str) -> tuple[str, str]:
    if form.name == "alpaca":
        given = f"### Input:\n{row['input']}\n\n" if row.get("input") else ""
        return f"### Instruction:\n{row['instruction']}\n\n{given}### Response:\n", row.get("output") or ""
    prompt: str = row["prompt"]
    return prompt + ("" if prompt[-1:].isspace() else separator), row.get("completion") or ""


def _messages(row: Row, form: Format) -> Messages:
    if form.name == "messages":
        messages: Messages = row["messages"]
        return messages
    return [{"role": SPEAKERS[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]


def _chat(messages: Messages, tokenizer: PreTrainedTokenizerBase, answer_next: bool = False) -> list[Segment]:
    """Render a conversation with the tokenizer's template and cut it at its assistant turns."""
    marked = re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template())
    try:
        text, spans = (_marked if marked else _by_prefixes)(messages, tokenizer, answer_next)
    except need("jinja2", "train").TemplateError as error:
        raise DataError(f"the chat template refuses this conversation: {error}") from error
    eos, cuts, at = str(tokenizer.eos_token), list[Segment](), 0
    for start, stop in spans:
        stop += len(eos) if text.startswith(eos, stop) else 0  # a block that leaves out the token to stop at
        cuts += [Segment(text[at:start], False), Segment(text[start:stop], True)]
        at = stop
    return [cut for cut in [*cuts, Segment(text[at:], False)] if cut.text or cut.trained]


Spans = list[tuple[int, int]]


def _marked(messages: Messages, tokenizer: PreTrainedTokenizerBase, answer_next: bool) -> tuple[str, Spans]:
    """The template's own `{% generation %}` blocks, as character spans."""
    from transformers.utils.chat_template_utils import render_jinja_template

    special: dict[str, Any] = tokenizer.special_tokens_map
    rendered: Any = render_jinja_template(
        [_plain(messages)],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        add_generation_prompt=answer_next,
        **special,
    )
    (text,), (spans,) = rendered
    return text, spans


def _by_prefixes(messages: Messages, tokenizer: PreTrainedTokenizerBase, answer_next: bool) -> tuple[str, Spans]:
    """Render ever longer beginnings: what an assistant turn adds to the prompt before it is its span."""

    def render(count: int, answer: bool) -> str:
        text = tokenizer.apply_chat_template(_plain(messages[:count]), tokenize=False, add_generation_prompt=answer)
        return str(text)

    whole, spans = render(len(messages), answer_next), Spans()
    for number, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        before, after = render(number, True), render(number + 1, False)
        if not (after.startswith(before) and whole.startswith(after)):
            raise DataError(
                f"turn {number + 1}: the chat template renders this conversation's beginning differently once more "
                "turns follow (it may strip earlier reasoning), so assistant turns cannot be told apart; mark them in "
                "the template with {% generation %} ... {% endgeneration %}, or keep one assistant turn a row"
            )
        spans.append((len(before), len(after)))
    return whole, spans


def _plain(messages: Messages) -> list[dict[str, Any]]:
    """Messages without the nulls that a table puts where a turn lacks a key; templates would print them."""
    return [{key: value for key, value in turn.items() if value is not None} for turn in messages]
