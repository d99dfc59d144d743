"""What every route that asks a model does: ask, while watching whether somebody still waits, and stream the answer.

Its annotations are values, not strings, because FastAPI reads those of routes, and finds local imports no other way.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from lorakit.errors import RequestError
from lorakit.serving.answer import Answer, Interrupted, Piece
from lorakit.serving.http.answers import event
from lorakit.serving.http.gate import GONE, Refused, Visit
from lorakit.serving.http.refusals import refusal
from lorakit.serving.service import Question, Service

if TYPE_CHECKING:
    from starlette.requests import Request

T = TypeVar("T")


def visit_of(request: "Request") -> Visit:
    """Return what the gate knows of a request."""
    visit: Visit = request.state.visit
    return visit


async def asked(service: Service, question: Question, request: "Request", prefix: str) -> Answer:
    """Ask, and see to it that the answer ends with the request; its id is `prefix-` and the request's.

    Raises:
        LorakitError: what the service says.
        Refused: the client went away meanwhile.
    """
    visit = visit_of(request)

    async def ask() -> Answer:
        answer = await service.ask(question, visit.key, f"{prefix}-{visit.own}")
        visit.closing.append(answer.close)
        return answer

    answer = await unless_gone(request, ask())
    visit.adapter, visit.digest, visit.answer = answer.adapter, answer.resolved.digest, answer.id
    return answer


async def unless_gone(request: "Request", work: Awaitable[T]) -> T:
    """Return what `work` does, or cancel it when the client goes away.

    Raises:
        Refused: the client went away.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Refused(GONE, "gone", "the client went away")
    finally:
        for one in (task, gone):
            one.cancel()
        with suppress(BaseException):
            await asyncio.gather(task, gone, return_exceptions=True)


async def streamed(
    answer: Answer, visit: Visit, written: Callable[[list[Piece]], str], last: Callable[[], str]
) -> AsyncIterator[str]:
    """Yield the events of an answer, then the last ones; where it is interrupted, an event that says so ends it."""
    try:
        async for pieces in answer.pieces():
            if text := written(pieces):
                yield text
        yield last()
    except Interrupted as lost:
        visit.code, body, _ = refusal(lost)
        yield event(body)


def model_named(model: str | None, adapter_id: str | None, service: Service) -> str:
    """Return the model that is asked: LoRAX's `adapter_id` names one as well as OpenAI's `model` does.

    Raises:
        RequestError: two different ones.
    """
    if not adapter_id:
        return service.base if model is None else model
    if model in (None, adapter_id) or model in service.bases:
        return adapter_id
    raise RequestError(f"model is {model!r} and adapter_id {adapter_id!r}; name one adapter", param="adapter_id")


async def _gone(request: "Request") -> Any:
    while (await request.receive())["type"] != "http.disconnect":
        pass
