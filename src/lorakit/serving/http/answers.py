"""Answers in OpenAI's words: whole ones and the chunks of a stream, for completions and for chats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lorakit.serving.answer import Answer, Piece
from lorakit.serving.prompts import Prompts
from lorakit.serving.requests import Token

DONE = "data: [DONE]\n\n"


def event(value: Any) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def usage(answer: Answer) -> dict[str, int]:
    """Return the tokens an answer took so far."""
    read, written = answer.prompt_tokens, answer.completion_tokens
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


@dataclass
class _Written:
    """What a choice has so far."""

    begun: bool = False
    text: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    characters: int = 0  # of its tokens, each written by itself
    reason: str | None = None


class Shape:
    """Puts the pieces of one answer into OpenAI's words.

    Args:
        kind: which of the two routes.
        answer: whose pieces they are.
        model: as it was asked for.
        prompts: writes single tokens.
        logprobs: whether they were asked for.
        before: what each choice begins with: its prompt, where the client wants it echoed.
    """

    def __init__(
        self,
        kind: Literal["text_completion", "chat.completion"],
        answer: Answer,
        model: str,
        prompts: Prompts,
        *,
        logprobs: bool,
        before: Sequence[str] = (),
    ) -> None:
        self.answer, self._kind, self._prompts, self._logprobs = answer, kind, prompts, logprobs
        self._head = {"id": answer.id, "object": kind, "created": answer.created, "model": model,
                      "system_fingerprint": f"lora-{(answer.resolved.digest or 'none')[:12]}"}  # fmt: skip
        self._before, self._choices = before, dict[int, _Written]()

    async def whole(self) -> dict[str, Any]:
        """Return the whole answer, once it is there; raises `Interrupted`."""
        async for pieces in self.answer.pieces():
            for piece in pieces:
                written = self._choices.setdefault(piece.choice, _Written())
                written.text.append(piece.text)
                written.tokens.extend(piece.tokens)
                written.reason = piece.reason or written.reason
        choices = []
        for number, written in sorted(self._choices.items()):
            text = self._opening(number) + "".join(written.text)
            said = (
                {"text": text}
                if self._kind == "text_completion"
                else {"message": {"role": "assistant", "content": text, "refusal": None}}
            )
            told = self._told(written, written.tokens)
            choices.append({"index": number, **said, "logprobs": told, "finish_reason": written.reason})
        return {**self._head, "choices": choices, "usage": usage(self.answer)}

    def chunks(self, pieces: Sequence[Piece], with_usage: bool) -> str:
        """Return the events of some pieces, which may be none."""
        return "".join(self._chunk(piece, with_usage) for piece in pieces)

    def last(self) -> str:
        """Return the event that tells the usage."""
        return event({**self._streamed(), "choices": [], "usage": usage(self.answer)})

    def _chunk(self, piece: Piece, with_usage: bool) -> str:
        written = self._choices.setdefault(piece.choice, _Written())
        begins, written.begun = not written.begun, True
        if not (piece.text or piece.reason or begins or (self._logprobs and piece.tokens)):
            return ""
        text = (self._opening(piece.choice) if begins else "") + piece.text
        if self._kind == "text_completion":
            said: dict[str, Any] = {"text": text}
        else:
            said = {"delta": ({"role": "assistant"} if begins else {}) | {"content": text}}
        choice = {"index": piece.choice, **said, "logprobs": self._told(written, piece.tokens),
                  "finish_reason": piece.reason}  # fmt: skip
        return event({**self._streamed(), "choices": [choice], **({"usage": None} if with_usage else {})})

    def _streamed(self) -> dict[str, Any]:
        return self._head if self._kind == "text_completion" else {**self._head, "object": "chat.completion.chunk"}

    def _opening(self, choice: int) -> str:
        return self._before[choice] if self._before else ""

    def _told(self, written: _Written, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        if self._kind == "chat.completion":
            content = [
                {**self._candidate(t.id, t.logprob), "top_logprobs": [self._candidate(*top) for top in t.top]}
                for t in tokens
            ]
            return {"content": content, "refusal": None}
        names, offsets = [self._prompts.token(token.id) for token in tokens], list[int]()
        for name in names:
            offsets.append(written.characters)
            written.characters += len(name)
        tops = [self._by_text(token) for token in tokens]
        return {"tokens": names, "token_logprobs": [token.logprob for token in tokens], "top_logprobs": tops,
                "text_offset": offsets}  # fmt: skip

    def _by_text(self, token: Token) -> dict[str, float]:
        """Return the candidates by their text; of two with the same, the likelier."""
        found: dict[str, float] = {}
        for id, logprob in token.top:
            found.setdefault(self._prompts.token(id), logprob)
        return found

    def _candidate(self, id: int, logprob: float | None) -> dict[str, Any]:
        name = self._prompts.token(id)
        half = "\N{REPLACEMENT CHARACTER}" in name  # part of a character: its bytes cannot be told from its text
        return {"token": name, "logprob": logprob, "bytes": None if half else list(name.encode())}
