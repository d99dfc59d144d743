"""OpenAI's routes: models, completions, chats. An official client works by its base URL alone.

Its annotations are values, not strings, because FastAPI reads those of routes, and finds local imports no other way.
"""

from datetime import datetime
from typing import TYPE_CHECKING, Any

from lorakit.serving.http.answers import DONE, Shape
from lorakit.serving.http.asking import asked, model_named, streamed, unless_gone, visit_of
from lorakit.serving.http.schemas import Asked, ChatRequest, CompletionRequest
from lorakit.serving.requests import Sampling
from lorakit.serving.service import Question, Service, telling_only
from lorakit.serving.shelf.registry import Model

if TYPE_CHECKING:
    from fastapi import FastAPI

    from lorakit.serving.answer import Answer


def add_openai(app: "FastAPI", service: Service) -> None:
    """Add the two routes that ask a model as OpenAI's clients do."""
    from fastapi import Request
    from fastapi.responses import JSONResponse, Response, StreamingResponse

    async def answered(shape: Shape, body: Asked, request: Request) -> Response:
        if not body.stream:
            return JSONResponse(await unless_gone(request, shape.whole()))
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        events = streamed(shape.answer, visit_of(request), lambda pieces: shape.chunks(pieces, with_usage),
                          lambda: (shape.last() if with_usage else "") + DONE)  # fmt: skip
        return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-store"})

    @app.post("/v1/completions", tags=["OpenAI"])
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Go on from a text."""
        question = _question(body, service, body.logprobs, body.max_tokens, prompt=body.prompt)
        answer = await asked(service, question, request, "cmpl")
        before = _echoed(answer, body, service) if body.echo else ()
        shape = Shape("text_completion", answer, body.model, service.prompts,
                      logprobs=body.logprobs is not None, before=before)  # fmt: skip
        return await answered(shape, body, request)

    @app.post("/v1/chat/completions", tags=["OpenAI"])
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer the last message of a conversation."""
        most = body.max_completion_tokens or body.max_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        turns = tuple(message.turn for message in body.messages)
        answer = await asked(service, _question(body, service, logprobs, most, turns=turns), request, "chatcmpl")
        shape = Shape("chat.completion", answer, body.model, service.prompts, logprobs=body.logprobs)
        return await answered(shape, body, request)


def add_models(app: "FastAPI", service: Service) -> None:
    """Add the routes that list what may be asked."""
    from fastapi import Request, Response
    from fastapi.responses import JSONResponse

    @app.get("/v1/models", tags=["OpenAI"])
    async def models(request: Request) -> Any:
        """List the base and the adapters that this key may ask."""
        key = visit_of(request).key

        def listed() -> Response:  # of ten thousand adapters, and the event loop is everybody's
            data = [_listed(one, service) for one in service.registry.models() if key.may_ask(one.id)]
            return JSONResponse({"object": "list", "data": data})

        return await service.aside(listed)

    @app.get("/v1/models/{model:path}", tags=["OpenAI"])
    async def model(model: str, request: Request) -> Any:
        """Tell of one model."""
        service.need_model(visit_of(request).key, model)
        known = {one.id: one for one in await service.aside(service.registry.models)}
        if model in known:
            return _listed(known[model], service)
        with telling_only(visit_of(request).key, model):
            resolved = service.registry.names.resolve(model, request=visit_of(request).id)
        return _listed(Model(model, resolved.digest, service.base), service)


def _listed(model: Model, service: Service) -> dict[str, Any]:
    """Return a model as OpenAI and vLLM list it: its root is what it is made of, for an adapter its digest."""
    since = service.since if model.since is None else datetime.fromisoformat(model.since).timestamp()
    root = model.digest if model.parent is not None else model.id
    told = {"id": model.id, "object": "model", "created": int(since), "owned_by": "lorakit", "root": root}
    return told | {"parent": model.parent} | ({"arms": dict(model.arms)} if model.arms else {})


def _question(body: Asked, service: Service, logprobs: int | None, most: int | None, **asks: Any) -> Question:
    sampling = Sampling(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=max(body.top_k, 0),
        seed=body.seed,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        logit_bias={int(token): bias for token, bias in body.logit_bias.items()},
        logprobs=logprobs,
        ignore_eos=body.ignore_eos,
    )
    return Question(
        model=model_named(body.model, body.adapter_id, service),
        sampling=sampling,
        max_tokens=most,
        n=body.n,
        stops=body.stops,
        scale=body.lora_scale,
        user=body.user,
        **asks,
    )


def _echoed(answer: "Answer", body: CompletionRequest, service: Service) -> list[str]:
    """Return what each choice begins with: its prompt, as it was sent, or written out where it was sent as tokens."""
    prompt: Any = body.prompt
    several = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    texts = [one if isinstance(one, str) else service.prompts.text(one) for one in several]
    return [text for text in texts for _ in range(body.n)]
