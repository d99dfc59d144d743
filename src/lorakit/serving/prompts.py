"""From what was asked to token ids: texts as they are, conversations as the adapter saw them in training.

A tokenizer is one object for all threads, and some change their settings while they encode, so one encodes at a time.
Templates render meanwhile, each within its own limits (templates.py).
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.errors import DataError, LorakitError, RequestError
from lorakit.serving.requests import TOO_LONG
from lorakit.serving.templates import Templates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorakit.core.state import Purpose

Ids = tuple[int, ...]
Turn = Mapping[str, str]
_ASKS = ("prompt+completion", "alpaca")  # formats whose prompt is one text


@dataclass(frozen=True)
class Reading:
    """How an adapter reads a conversation; the base reads it by its tokenizer's template."""

    purpose: Purpose | None = None
    template: str | None = None


class Prompts:
    """Encodes prompts and writes tokens out, with one tokenizer; every function may be called on any thread.

    A text that cannot fit into `context` tokens, however long each is, is refused before it is encoded: encoding
    megabytes would hold everybody up.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: int) -> None:
        self.tokenizer, self._context = tokenizer, context
        self._most = context * max(map(len, tokenizer.get_vocab()), default=1)
        self._alone, self._templates = threading.Lock(), Templates()

    def completion(self, prompt: str | Sequence[Any]) -> list[Ids]:
        """Return the ids of a text, of several, of token ids as they are, or of several lists of them.

        Raises:
            RequestError: no prompt at all.
        """
        if not isinstance(prompt, str) and not prompt:
            raise RequestError(
                "prompt is an empty list; give at least one text, or at least one token id", param="prompt"
            )
        if not isinstance(prompt, str) and isinstance(prompt[0], int):
            return [tuple(prompt)]
        several = [prompt] if isinstance(prompt, str) else list(prompt)
        return [self._encoded(one) if isinstance(one, str) else tuple(one) for one in several]

    def chat(self, turns: Sequence[Turn], reading: Reading, model: str) -> Ids:
        """Return the ids of a conversation that the assistant goes on with; `model` is for errors.

        An adapter that was trained on prompts with answers reads one message, rendered as those were.

        Raises:
            RequestError: a conversation that ends with the assistant, that this adapter or the template does not
                take, or no template.
        """
        if turns[-1]["role"] == "assistant":
            raise RequestError(
                "the last message is the assistant's, so nothing asks for an answer; end with a user's",
                param="messages",
            )
        self._refuse_long(sum(len(turn["content"]) for turn in turns), "the messages have")
        purpose = reading.purpose
        if purpose is not None and purpose.format in _ASKS:
            if [turn["role"] for turn in turns] != ["user"]:
                raise RequestError(
                    f"{model} was trained on single prompts ({purpose.format}), so it reads one message of the user "
                    "and no other; send that one, or use /v1/completions",
                    param="messages",
                )
            return self._ids(
                turns[0]["content"], self.tokenizer, purpose.format, purpose.separator or "", nullcontext()
            )
        tokenizer = self.tokenizer
        if reading.template is not None:
            tokenizer = copy.copy(tokenizer)
            tokenizer.chat_template = reading.template
        if not tokenizer.chat_template:
            raise RequestError(
                f"{model} has no chat template, so nothing says how messages become a prompt; use /v1/completions, or "
                "give the base a chat_template.jinja"
            )
        rendering = self._templates.rendering(tokenizer.get_chat_template(), model)
        return self._ids([dict(turn) for turn in turns], tokenizer, "messages", "", rendering)

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special ones left out."""
        decoded = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(decoded)

    def token(self, id: int) -> str:
        """Return the text of one token by itself, a special one by its name."""
        return str(self.tokenizer.decode([id], clean_up_tokenization_spaces=False))

    def _refuse_long(self, characters: int, what: str) -> None:
        if characters > self._most:
            raise RequestError(
                f"{what} {characters:,} characters, more than a context of {self._context} tokens can hold; send less",
                param="prompt",
                code=TOO_LONG,
            )

    def _encoded(self, text: str) -> Ids:
        self._refuse_long(len(text), "the prompt has")
        with self._alone:
            return tuple(self.tokenizer(text, verbose=False)["input_ids"])

    def _ids(
        self, row: Any, tokenizer: PreTrainedTokenizerBase, format: str, separator: str,
        rendering: AbstractContextManager[None],
    ) -> Ids:  # fmt: skip
        """Return the ids of a conversation; the tokenizer is held while it encodes, not while a template renders."""
        from lorakit.data import FORMATS
        from lorakit.data.masking import encode, opening, prompt_segments

        form = FORMATS[format]
        try:
            with rendering:
                parts = prompt_segments(row, tokenizer, form, separator)
            self._refuse_long(sum(len(part.text) for part in parts), "the rendered messages have")
            with self._alone:
                return tuple(encode([parts], tokenizer, opening(tokenizer, form), "completions")[0].ids)
        except DataError as refused:
            raise RequestError(f"messages: {refused}", param="messages") from refused
        except LorakitError:
            raise
        except Exception as failed:  # a template is a program, and may do anything to a conversation
            raise RequestError(
                f"messages: the chat template fails on this conversation: {failed}", param="messages"
            ) from failed
