"""LoRAX's routes `/generate` and `/generate_stream`, for clients that were written for it or for TGI.

Its annotations are values, not strings, because FastAPI reads those of routes, and finds local imports no other way.
"""

from typing import TYPE_CHECKING, Any

from lorakit.serving.answer import Answer, Piece
from lorakit.serving.http.answers import event
from lorakit.serving.http.asking import asked, model_named, streamed, unless_gone, visit_of
from lorakit.serving.http.schemas import LoraxParameters, LoraxRequest
from lorakit.serving.requests import Sampling, Token
from lorakit.serving.service import Question, Service

if TYPE_CHECKING:
    from fastapi import FastAPI


def add_lorax(app: "FastAPI", service: Service) -> None:
    """Add LoRAX's routes; `parameters.adapter_id` is the name of a served adapter, never a path or a hub's."""
    from fastapi import Request
    from fastapi.responses import JSONResponse, Response, StreamingResponse

    @app.post("/generate", tags=["LoRAX"])
    async def generate(body: LoraxRequest, request: Request) -> Response:
        """Go on from a text."""
        written = _Written(await asked(service, _question(body, service), request, "lorax"), body, service)
        return JSONResponse(await unless_gone(request, written.whole()))

    @app.post("/generate_stream", tags=["LoRAX"])
    async def generate_stream(body: LoraxRequest, request: Request) -> Response:
        """Go on from a text, one event a token."""
        written = _Written(await asked(service, _question(body, service), request, "lorax"), body, service)
        events = streamed(written.answer, visit_of(request), written.events, lambda: "")
        return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-store"})


class _Written:
    """Puts the pieces of an answer into LoRAX's words."""

    def __init__(self, answer: Answer, body: LoraxRequest, service: Service) -> None:
        self.answer, self._body, self._prompts = answer, body, service.prompts
        self._special = frozenset(service.prompts.tokenizer.all_special_ids)
        self._text: list[str] = [body.inputs] if body.parameters.return_full_text else []
        self._tokens: list[dict[str, Any]] = []
        self._reason: str | None = None

    async def whole(self) -> dict[str, Any]:
        async for pieces in self.answer.pieces():
            self.events(pieces)
        details = {"details": self._details() | {"tokens": self._tokens}} if self._body.parameters.details else {}
        return {"generated_text": "".join(self._text)} | details

    def events(self, pieces: list[Piece]) -> str:
        """Return an event for each token but the newest, which waits: the whole text comes with the last of all."""
        return "".join(self._event(piece) for piece in pieces)

    def _event(self, piece: Piece) -> str:
        self._text.append(piece.text)
        told = ""
        for token in piece.tokens:
            told += self._told(self._tokens[-1]) if self._tokens else ""
            self._tokens.append(self._token(token))
        if piece.reason is None:
            return told
        self._reason = "stop_sequence" if piece.matched else {"stop": "eos_token"}.get(piece.reason, piece.reason)
        none = {"id": self._prompts.tokenizer.eos_token_id or 0, "text": "", "logprob": None, "special": True}
        last = self._tokens[-1] if self._tokens else none
        return told + self._told(last, "".join(self._text), self._details())

    def _told(self, token: dict[str, Any], text: str | None = None, details: dict[str, Any] | None = None) -> str:
        return event({"token": token, "generated_text": text, "details": details})

    def _token(self, token: Token) -> dict[str, Any]:
        text, special = self._prompts.token(token.id), token.id in self._special
        return {"id": token.id, "text": text, "logprob": token.logprob, "special": special}

    def _details(self) -> dict[str, Any]:
        return {
            "finish_reason": self._reason,
            "prompt_tokens": self.answer.prompt_tokens,
            "generated_tokens": self.answer.completion_tokens,
            "seed": self._body.parameters.seed,
        }


def _question(body: LoraxRequest, service: Service) -> Question:
    """Return what is asked; without `do_sample`, a temperature, top_p or top_k asks for draws too, as at LoRAX."""
    given: LoraxParameters = body.parameters
    draws = given.do_sample or any(value is not None for value in (given.temperature, given.top_p, given.top_k))
    sampling = Sampling(
        temperature=(given.temperature or 1.0) if draws else 0.0,
        top_p=given.top_p or 1.0,
        top_k=given.top_k or 0,
        seed=given.seed,
        logprobs=0,
        ignore_eos=given.ignore_eos_token,
    )
    model = model_named(None, given.adapter_id, service)
    return Question(model, body.inputs, sampling=sampling, max_tokens=given.max_new_tokens, stops=tuple(given.stop))
