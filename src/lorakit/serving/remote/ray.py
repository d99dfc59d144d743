"""Replicas of an engine under Ray Serve, on one machine or many, as one engine.

A replica is a process with an engine of its own. Ray sends a request where its adapter is loaded already, as long as
that replica has room; a replica keeps its most recent adapters. Folders travel as paths, so every machine must see the
store under the same one.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import uuid
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit import errors
from lorakit.core.lazy import need
from lorakit.errors import LorakitError, ServingError, UnknownAdapterError
from lorakit.serving.remote.relay import Errand, Relay
from lorakit.serving.requests import End, Engine, Event, Limits, Loaded, Request, Sink, Stats, check_request

Refusal = tuple[str, str]
"""The name of an error of ours and its text; as an exception it would come with a traceback of the other process."""


class RayEngine:
    """Serves from replicas (see `Engine`); `close` ends them."""

    def __init__(
        self,
        build: Callable[[], Engine],
        *,
        replicas: int = 2,
        adapters: int = 64,
        queue: int = 256,
        cpus: float = 1.0,
        gpus: float = 0.0,
    ) -> None:
        """Start the replicas, in the cluster of `RAY_ADDRESS` or on this machine.

        Args:
            build: makes one replica's engine, there; it must be importable on every machine.
            replicas: how many.
            adapters: that one replica keeps loaded.
            queue: requests that may wait here.
            cpus: of the machine that a replica takes.
            gpus: that a replica takes.
        """
        ray, serve = need("ray", "ray"), need("ray.serve", "ray")
        self._ours = not ray.is_initialized()
        if self._ours:
            ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
        serve.start(proxy_location="Disabled")
        self._name = f"lorakit-{uuid.uuid4().hex[:8]}"
        try:
            made = _deployment(serve, adapters).options(
                name="engine", num_replicas=replicas, max_ongoing_requests=10_000,
                ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
            )  # fmt: skip
            self._handle = serve.run(made.bind(build), name=self._name, route_prefix=None)
            one: Limits = self._handle.limits.remote().result(timeout_s=600)
        except BaseException:
            self._end()
            raise
        self._limits = replace(one, slots=one.slots * replicas, queue=queue)
        self._lock = threading.Lock()
        self._folders: dict[str, str] = {}
        self._relay = Relay(self._carry, self._limits.slots, queue, "ray")

    @property
    def limits(self) -> Limits:
        """Return what one request may ask for."""
        return self._limits

    def load(self, digest: str, folder: Path) -> Loaded:
        """Load an adapter on one replica, as a proof; the others load it when a request brings it there."""
        place = str(folder.resolve())
        found: Loaded | Refusal = self._at(digest).load.remote(digest, place).result(timeout_s=600)
        if not isinstance(found, Loaded):
            raise _error(found)
        with self._lock:
            self._folders[digest] = place
        return found

    def unload(self, digest: str) -> None:
        """Take no more requests with an adapter; replicas forget it when others need its place."""
        with self._lock:
            self._folders.pop(digest, None)

    def submit(self, request: Request, sink: Sink) -> None:
        """Queue a request; its tokens and, in every case, one `End` reach `sink`."""
        check_request(request, self._limits)
        with self._lock:
            if request.adapter is not None and request.adapter not in self._folders:
                raise UnknownAdapterError(f"no adapter {request.adapter!r} is loaded")
            self._relay.submit(request, _Placed(sink, self._folders.get(request.adapter or "")))

    def cancel(self, id: str) -> None:
        """End a request soon with `cancelled`."""
        self._relay.cancel(id)

    def stats(self) -> Stats:
        """Return what is under way from here."""
        return self._relay.stats()

    def close(self) -> None:
        """End every request with `cancelled`, and the replicas."""
        self._relay.close()
        self._end()

    def _end(self) -> None:
        need("ray.serve", "ray").delete(self._name, _blocking=True)
        if self._ours:
            need("ray.serve", "ray").shutdown()
            need("ray", "ray").shutdown()

    def _at(self, digest: str | None, stream: bool = False) -> Any:
        return self._handle.options(stream=stream, multiplexed_model_id=digest or "")

    def _carry(self, errand: Errand) -> End:
        request = errand.request
        assert isinstance(errand.sink, _Placed)
        left = None if request.deadline is None else request.deadline - time.monotonic()  # their clock is another
        asked = replace(request, deadline=None)
        answer = self._at(request.adapter, stream=True).generate.remote(asked, errand.sink.folder, left)
        errand.breaks(answer.cancel)
        for events in answer:
            for event in events:
                if isinstance(event, End):
                    return event
                errand.tell(event)
        return End("error", "a replica broke an answer off")


class _Placed:
    """A sink that remembers where the adapter of its request lay when it was taken."""

    def __init__(self, sink: Sink, folder: str | None) -> None:
        self._sink, self.folder = sink, folder

    def __call__(self, event: Event) -> None:
        self._sink(event)


class Held:
    """An adapter of a replica; it stays in the engine as long as anybody has this."""


class Replica:
    """One engine on the event loop of its process; what Ray adds is in `_deployment`."""

    def __init__(self, build: Callable[[], Engine]) -> None:
        self.engine = build()
        self.places: dict[str, str] = {}
        self._users: Counter[str] = Counter()
        self._lock = threading.Lock()

    async def limits(self) -> Limits:
        """Return what one request may ask of this replica."""
        return self.engine.limits

    async def held(self, digest: str) -> Held:
        """Return an adapter, loaded."""
        with self._lock:
            self._users[digest] += 1
        try:
            await asyncio.get_running_loop().run_in_executor(None, self.engine.load, digest, Path(self.places[digest]))
        except BaseException:
            self._release(digest)
            raise
        one = Held()
        # On the loop: it may go at any moment, on any thread, also on the engine's with the engine's lock in its hands.
        weakref.finalize(one, _soon, asyncio.get_running_loop(), self._release, digest)
        return one

    async def answer(self, request: Request, left: float | None) -> AsyncIterator[list[Event]]:
        """Yield the events of a request, as many at once as there are; a reader that goes away cancels it."""
        loop, events, woken = asyncio.get_running_loop(), queue.SimpleQueue[Event](), asyncio.Event()

        def sink(event: Event) -> None:
            events.put(event)
            loop.call_soon_threadsafe(woken.set)

        until = None if left is None else time.monotonic() + left
        own = replace(request, deadline=until, id=uuid.uuid4().hex)  # two fronts may count alike
        self.engine.submit(own, sink)
        try:
            ended = False
            while not ended:
                await woken.wait()
                woken.clear()
                found = [events.get() for _ in range(events.qsize())]
                ended = bool(found) and isinstance(found[-1], End)
                yield found
        finally:
            self.engine.cancel(own.id)

    def _release(self, digest: str) -> None:
        with self._lock:
            self._users[digest] -= 1
            if self._users[digest] == 0:
                del self._users[digest]
                self.engine.unload(digest)


def _soon(loop: asyncio.AbstractEventLoop, function: Callable[[str], None], digest: str) -> None:
    with suppress(RuntimeError):  # the loop is closed, and the replica with it
        loop.call_soon_threadsafe(function, digest)


def _deployment(serve: Any, adapters: int) -> Any:
    """Return the replica as Ray deploys it, with an LRU of `adapters`."""

    class Deployed(Replica):
        @serve.multiplexed(max_num_models_per_replica=adapters)  # type: ignore[untyped-decorator]
        async def adapter(self, digest: str) -> Held:
            return await self.held(digest)

        async def load(self, digest: str, place: str) -> Loaded | Refusal:
            self.places[digest] = place
            try:
                await self.adapter(digest)
                return self.engine.load(digest, Path(place))
            except LorakitError as refused:
                return type(refused).__name__, str(refused)

        async def generate(self, request: Request, place: str | None, left: float | None) -> AsyncIterator[list[Event]]:
            try:
                held = None
                if request.adapter is not None and place is not None:
                    self.places[request.adapter] = place
                    held = await self.adapter(request.adapter)
                async for events in self.answer(request, left):
                    yield events
                del held  # until here, whoever else is loaded
            except LorakitError as refused:
                yield [End("error", str(refused))]

    return serve.deployment(Deployed)


def _error(refusal: Refusal) -> LorakitError:
    kind = getattr(errors, refusal[0], ServingError)
    try:
        made: LorakitError = kind(refusal[1])
    except TypeError:  # BusyError wants more
        made = ServingError(refusal[1])
    return made
