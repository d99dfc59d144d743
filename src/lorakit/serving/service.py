"""Text in, text out: what stands between HTTP and the engine's token ids.

A question finds its adapter, becomes tokens, and is handed to the engine; the answer comes back as pieces of text that
are certain. Whatever blocks runs on threads of its own, so a slow load keeps nobody else waiting, and whatever ends an
answer early (a stop string, a client that went away, the deadline) ends the engine's request too.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from lorakit.errors import BusyError, LorakitError, RequestError, UnknownAdapterError, shown
from lorakit.serving.answer import Answer
from lorakit.serving.feedback import Answered, Feedback
from lorakit.serving.keys import ANYONE, Key
from lorakit.serving.metrics import Metrics
from lorakit.serving.prompts import Ids, Prompts, Reading, Turn
from lorakit.serving.requests import Engine, Request, Sampling
from lorakit.serving.shelf.manifest import read_manifest
from lorakit.serving.text import Writer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorakit.serving.shelf.names import Resolved
    from lorakit.serving.shelf.registry import Registry, Use

T = TypeVar("T")
_log = logging.getLogger("lorakit.serving")
_READINGS = 1024  # manifests that are remembered
_THREADS = 32  # of each pool; they wait for disks and locks, not for a processor


class Draining(BusyError):
    """The server is about to stop, and takes nothing new."""


@dataclass(frozen=True)
class Question:
    """What was asked, whichever route it came by.

    Args:
        model: the base, an adapter, an alias.
        prompt: a text, several, token ids, or several lists of them; None for a conversation.
        turns: a conversation, where there is no prompt.
        sampling: how tokens are chosen; `max_tokens` of it is not read.
        max_tokens: the answer ends here at the latest; None leaves all of the context to it.
        n: answers to each prompt, each with its own seed.
        stops: texts that end an answer.
        scale: how strongly the adapter acts.
        user: whose question it is, so that an alias with several targets gives the same one again.
    """

    model: str
    prompt: str | Sequence[Any] | None = None
    turns: tuple[Turn, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    n: int = 1
    stops: tuple[str, ...] = ()
    scale: float = 1.0
    user: str = ""


class Service:
    """Answers questions with an engine and the adapters of a registry, for any number of clients at once.

    Args:
        engine: what makes tokens.
        registry: which model a name means, and its adapter in the engine.
        tokenizer: the base's.
        metrics: counts what is done.
        feedback: told of every answer, so that ratings find their adapter; without, none is taken.
        timeout: seconds an answer may take, the wait for a slot included.
        most_unread: tokens of an answer that may wait for a client that does not read.
    """

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        tokenizer: PreTrainedTokenizerBase,
        *,
        metrics: Metrics,
        feedback: Feedback | None = None,
        timeout: float = 600.0,
        most_unread: int = 4096,
    ) -> None:
        self.engine, self.registry, self.metrics, self.feedback = engine, registry, metrics, feedback
        self.prompts = Prompts(tokenizer, engine.limits.context)
        self.timeout, self.most_unread = timeout, most_unread
        self.warm = self.draining = False
        self.since = time.time()
        self._open: set[Answer] = set()
        self._reading_of = lru_cache(_READINGS)(self._read)
        self._threads = ThreadPoolExecutor(_THREADS, "serve")
        self._loads = ThreadPoolExecutor(_THREADS, "load")  # of their own: a slow disk holds up nobody who needs none
        self._ends = ThreadPoolExecutor(1, "end")  # of its own: loads may be waiting for a release
        self._notes = ThreadPoolExecutor(1, "note")  # of its own: somebody else may hold the file

    @property
    def bases(self) -> tuple[str, ...]:
        """Return the names of the base."""
        return self.registry.names.bases

    @property
    def base(self) -> str:
        """Return the base's first name."""
        return self.bases[0]

    @property
    def ready(self) -> bool:
        """Whether new questions are taken, and answered at full speed."""
        return self.warm and not self.draining and not self.engine.stats().broken

    @property
    def open(self) -> int:
        """Return how many answers are being made."""
        return len(self._open)

    def drain(self) -> None:
        """Take no new question; those that are being answered are finished."""
        self.draining = True

    async def aside(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run what blocks on a thread of its own, and return what it returns."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    def close(self) -> None:
        """End every answer; the engine belongs to whoever made it."""
        self.draining = True
        for answer in list(self._open):
            answer.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._loads.shutdown(wait=False, cancel_futures=True)
        self._ends.shutdown(wait=True)
        self._notes.shutdown(wait=True)

    async def ask(self, question: Question, key: Key = ANYONE, id: str | None = None) -> Answer:
        """Return the answer to a question, which is being made from now on; read it, or close it.

        Raises:
            AccessError: a model this key may not ask.
            Draining: the server is about to stop.
            UnknownAdapterError, AdapterFileError, SpecError: no such adapter, or one that cannot be served.
            RequestError: a question that cannot be answered as it is.
            BusyError: too many are waiting.
        """
        started = time.monotonic()
        if self.draining:
            raise Draining("this server is about to stop and takes no new request; ask another", retry_after=5.0)
        self.need_model(key, question.model)
        id = id or f"answer-{uuid.uuid4().hex}"
        held = self.registry.use(question.model, question.user or None, id)
        with telling_only(key, question.model):
            resolved, prompts = await self._held(held, question)
        try:
            answer = self._answer(question, key, id, resolved, prompts, started, held)
        except BaseException:
            self._release(held)
            raise
        self._open.add(answer)
        try:
            answer.submit()
        except BaseException:
            answer.close()
            raise
        return answer

    def need_model(self, key: Key, model: str) -> None:
        """Raise `AccessError` unless `key` may ask `model`, with the base before its name or without."""
        key.need_model(next((model[len(base) + 1 :] for base in self.bases if model.startswith(f"{base}:")), model))

    async def _held(self, held: Use, question: Question) -> tuple[Resolved, list[Ids]]:
        """Find and pin the adapter, which may have to be loaded first, and encode the prompts."""
        found = await self._entered(self._threads, held, held.enter_at_once, question)
        if found is None:
            found = await self._entered(self._loads, held, held.__enter__, question)
        assert found is not None
        return found

    async def _entered(
        self, pool: ThreadPoolExecutor, held: Use, enter: Callable[[], Resolved | None], question: Question
    ) -> tuple[Resolved, list[Ids]] | None:
        """Enter and encode on a pool; where nobody waits for it any more, let go of the adapter again."""

        def work() -> tuple[Resolved, list[Ids]] | None:
            if (resolved := enter()) is None:
                return None
            try:
                return resolved, self._encoded(question, resolved)
            except BaseException:
                self._release(held)
                raise

        working = asyncio.get_running_loop().run_in_executor(pool, work)
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            if working.cancelled():  # by `close`, before it began
                raise Draining("this server has stopped; ask another", retry_after=5.0) from None
            working.add_done_callback(
                lambda done: None if done.cancelled() or done.exception() else self._release(held)
            )
            raise

    def _encoded(self, question: Question, resolved: Resolved) -> list[Ids]:
        if resolved.digest is None and question.scale != 1.0:
            raise RequestError(
                f"lora_scale is {question.scale:g}, but {question.model} is the base without an adapter",
                param="lora_scale",
            )
        if question.prompt is not None:
            return self.prompts.completion(question.prompt)
        return [self.prompts.chat(question.turns, self._reading(resolved.digest), question.model)]

    def _reading(self, digest: str | None) -> Reading:
        """Return how an adapter reads conversations, or the base."""
        if digest is None:
            return Reading()
        return self._reading_of(digest)

    def _read(self, digest: str) -> Reading:
        manifest = read_manifest(self.registry.store.get(digest))
        return Reading(manifest.purpose, manifest.chat_template)

    def _answer(
        self,
        question: Question,
        key: Key,
        id: str,
        resolved: Resolved,
        prompts: list[Ids],
        started: float,
        held: Use,
    ) -> Answer:
        limits, count = self.engine.limits, len(prompts) * question.n
        if count > (most := limits.queue):  # all of them wait before the first has a slot
            raise RequestError(
                f"{count} answers were asked for, and this server takes {most} at once; ask for fewer", param="n"
            )
        requests = [
            Request(
                prompt=prompt,
                adapter=resolved.digest,
                scale=question.scale,
                sampling=_sampling(question, number, limits.context - len(prompt)),
                tenant=key.tenant,
                deadline=started + self.timeout,
                id=f"{id}-{at * question.n + number}",
            )
            for at, prompt in enumerate(prompts)
            for number in range(question.n)
        ]
        writers = [Writer(self.prompts.tokenizer, question.stops) for _ in requests]

        def ended(answer: Answer) -> None:
            self._open.discard(answer)
            self._release(held)
            self._note(answer, key)

        return Answer(id, resolved, prompts, requests, writers, engine=self.engine, metrics=self.metrics,
                      most_unread=self.most_unread, started=started, ended=ended)  # fmt: skip

    async def rate(self, response_id: str, rating: float, comment: str) -> None:
        """Rate an answer that has ended.

        Raises:
            RequestError: an answer that is not known here, or a server that takes no ratings.
        """
        feedback = self.feedback
        if feedback is None:
            raise RequestError("this server takes no ratings; it was started without a place for them")
        loop = asyncio.get_running_loop()  # on the thread that writes answers down, and so after this one was
        await loop.run_in_executor(self._notes, feedback.rate, response_id, rating, comment or None)

    def _note(self, answer: Answer, key: Key) -> None:
        if self.feedback is None or not answer.submitted:
            return
        resolved, seconds = answer.resolved, time.monotonic() - answer.started
        alias = resolved.name if "@" in resolved.name else None
        told = Answered(answer.id, resolved.name, resolved.digest, resolved.arm, alias, key.tenant, answer.first,
                        seconds, answer.completion_tokens, answer.reason)  # fmt: skip
        with suppress(RuntimeError):  # closing: there is no thread any more
            self._notes.submit(_noted, self.feedback, told)

    def _release(self, held: Use) -> None:
        try:
            self._ends.submit(held.__exit__, None, None, None)
        except RuntimeError:  # closing: there is no thread any more
            held.__exit__(None, None, None)


@contextmanager
def telling_only(key: Key, model: str) -> Iterator[None]:
    """Name no other models to a key that may not ask all of them, where `model` is not served."""
    try:
        yield
    except UnknownAdapterError:
        if "*" in key.models:
            raise
        raise UnknownAdapterError(f"{shown(model)} is not served here; GET /v1/models lists what you may ask") from None


def _noted(feedback: Feedback, told: Answered) -> None:
    try:
        feedback.answered(told)
    except LorakitError as failed:  # the answer was given; only its line in the statistics is lost
        _log.error("%s: not written down: %s", told.id, failed)


def _sampling(question: Question, number: int, room: int) -> Sampling:
    """Return the sampling of the answer `number` to a prompt: its own seed, and the room where no limit is given."""
    seed = question.sampling.seed
    return replace(
        question.sampling,
        max_tokens=question.max_tokens if question.max_tokens is not None else max(room, 1),
        seed=None if seed is None else (seed + number) % 2**63,
    )
