"""A running vLLM server as an engine: prompts go there as token ids, adapters by digest, out of folders never changed.

vLLM forgets its adapters when it is started anew, keeps its caches by an adapter's name, and takes an adapter of a
narrower base without a word (0.32). So a name there is a digest, whose content cannot change; shapes are compared with
the base before anything is sent; and what should be loaded is written down here and compared with what is, now and
then and whenever an answer fails.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection
from pathlib import Path
from typing import NoReturn

from lorakit.core.site import Skeleton
from lorakit.core.state import check_tensors
from lorakit.errors import AdapterFileError, RequestError, ServingError, SpecError, UnknownAdapterError, listing
from lorakit.inject.attach import fitted
from lorakit.persist import load
from lorakit.persist.peft import WEIGHTS
from lorakit.serving.remote.relay import Errand, Relay
from lorakit.serving.remote.servable import rank_to_serve, refusals
from lorakit.serving.remote.vllm_wire import Card, Refused, Unreached, Wire, body_of, tokens_of
from lorakit.serving.requests import End, Limits, Loaded, Request, Sink, Stats, check_request

_START = "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 (docs/deployment.md)"
_log = logging.getLogger(__name__)


class VLLMEngine:
    """Serves from a vLLM server (see `Engine`); several may share one server."""

    def __init__(
        self,
        url: str,
        *,
        skeleton: Skeleton,
        vocabulary: int,
        stops: Collection[int] = (),
        context: int | None = None,
        api_key: str | None = None,
        slots: int = 64,
        queue: int = 256,
        every: float = 5.0,
    ) -> None:
        """Ask the server what it serves, and start to keep its adapters as they should be.

        Args:
            url: of the server, as http://127.0.0.1:8000.
            skeleton: of the base it serves, which adapters are compared with.
            vocabulary: of the base.
            stops: tokens that end an answer, beside those of vLLM's own.
            context: positions of one sequence; as many as the server takes if None.
            api_key: what the server was started with, if it was.
            slots: answers that are asked of it at once; it batches them as it likes.
            queue: requests that may wait here.
            every: seconds between two looks at its adapters.

        Raises:
            ServingError: a server that does not answer, or takes no adapters while it runs.
        """
        self._wire, self._skeleton, self._stops = Wire(url, api_key), skeleton, frozenset(stops)
        base = self._base(self._cards())
        self._root, self._most = base.root, context
        self._name = base.id
        self._limits = Limits(self._context(base), vocabulary, slots, queue)
        self._check_routes()
        self._lock, self._changing = threading.Lock(), threading.Lock()
        self._wanted: dict[str, Path] = {}
        self._leaving: dict[str, Path] = {}
        self._places: dict[Path, str] = {}  # folders outside of a store, whose content may change
        self._kick, self._closed = threading.Event(), threading.Event()
        self._every, self._said = every, ""
        self._relay = Relay(self._carry, slots, queue, "vllm")
        self._thread = threading.Thread(target=self._watch, name="vllm-reconcile", daemon=True)
        self._thread.start()

    @property
    def limits(self) -> Limits:
        """Return what one request may ask for."""
        return self._limits

    def load(self, digest: str, folder: Path) -> Loaded:
        """Have the server load the adapter in a folder of the store, under its digest.

        Raises:
            SpecError: an adapter vLLM does not serve, with what to do instead.
            AdapterFileError: another base, or a folder the server cannot read or has under another digest.
            ServingError: a server that does not answer.
        """
        place = folder.resolve()
        if refused := refusals(place):
            raise SpecError(f"vLLM does not serve the adapter in {place}:\n{listing(refused)}")
        updates = fitted(load(place, checked=True), self._skeleton)
        check_tensors(updates)
        with self._changing:
            other = digest if place.name == digest else self._places.setdefault(place, digest)
            if other != digest:
                raise AdapterFileError(
                    f"{place} was loaded as {other[:12]} and is {digest[:12]} now; vLLM keeps its caches, so content "
                    "that changed needs a folder of its own: add it to the store"
                )
            self._put(digest, place, {card.id: card for card in self._cards()})
            with self._lock:
                self._wanted[digest] = place
                self._leaving.pop(digest, None)
        return Loaded(digest, len({update.site.path for update in updates}), (place / WEIGHTS).stat().st_size)

    def unload(self, digest: str) -> None:
        """Have the server forget an adapter, once the requests that name it are answered."""
        with self._lock:
            place = self._wanted.pop(digest, None)
            if place is not None:
                self._leaving[digest] = place
        self._kick.set()

    def submit(self, request: Request, sink: Sink) -> None:
        """Queue a request; its tokens and, in every case, one `End` reach `sink`."""
        check_request(request, self._limits)
        body_of(request, "", self._limits.context, self._stops)  # raises for what vLLM has no word for
        with self._lock:
            if request.adapter is not None and request.adapter not in self._wanted:
                raise UnknownAdapterError(f"no adapter {request.adapter!r} is loaded")
            self._relay.submit(request, sink)

    def cancel(self, id: str) -> None:
        """End a request soon with `cancelled`."""
        self._relay.cancel(id)

    def stats(self) -> Stats:
        """Return what is under way; vLLM's own numbers are at its /metrics."""
        return self._relay.stats()

    def close(self) -> None:
        """End every request with `cancelled` and leave the server with its adapters."""
        self._closed.set()
        self._kick.set()
        self._relay.close()
        self._thread.join()

    def reconcile(self) -> list[str]:
        """Load what the server should have and has not, unload what left, and return the digests that were loaded.

        Raises:
            ServingError: a server that does not answer or serves another base, or adapters that did not load.
        """
        with self._changing:
            there = {card.id: card for card in self._same_base()}
            used = self._relay.adapters()
            with self._lock:
                gone = {d: self._leaving.pop(d) for d in list(self._leaving) if d not in used}
                wanted = {**self._leaving, **self._wanted}
            for digest in gone.keys() & there.keys():
                self._drop(digest)
            missing = {d: place for d, place in wanted.items() if d not in there or there[d].root != str(place)}
            failed = []
            for digest, place in missing.items():
                try:
                    self._put(digest, place, there)
                except (AdapterFileError, RequestError, SpecError) as why:
                    failed.append(f"{digest[:12]}: {why}")
        if failed:
            raise ServingError(f"{len(failed)} adapter(s) could not be loaded again:\n{listing(failed)}")
        return list(missing)

    def _watch(self) -> None:
        while not self._closed.is_set():
            self._kick.wait(self._every)
            self._kick.clear()
            if self._closed.is_set():
                return
            self._repair()
            self._closed.wait(0.1)  # failing requests kick; the server is not asked more often than this

    def _repair(self) -> None:
        """Reconcile, and log what cannot be repaired now, once."""
        said = ""
        try:
            if again := self.reconcile():
                _log.warning("vLLM at %s had lost %d adapter(s); loaded again", self._wire.url, len(again))
        except (ServingError, AdapterFileError, SpecError, Refused) as failed:
            said = str(failed)
        except Exception:  # whatever it was, the next look may do better
            _log.exception("the adapters of %s could not be compared", self._wire.url)
        if said and said != self._said:
            _log.warning("%s", said)
        self._said = said

    def _same_base(self) -> list[Card]:
        """Return the server's models, whose base must be the one it began with."""
        cards = self._cards()
        base = self._base(cards)
        if base.root != self._root:
            raise ServingError(f"vLLM at {self._wire.url} serves {base.root} now, not {self._root} as before; restart")
        self._name = base.id
        return cards

    def _carry(self, errand: Errand) -> End:
        """Ask the server, once more where it had lost the adapter."""
        for again in (True, False):
            try:
                return self._answer(errand)
            except Refused as refused:
                if not (again and refused.status == 404):
                    return End("error", f"vLLM refused it ({refused.status}): {refused.message}")
                self._repair()
            except Unreached as broken:
                self._kick.set()
                return End("error", str(broken))
        raise AssertionError

    def _answer(self, errand: Errand) -> End:
        request = errand.request
        body = body_of(request, request.adapter or self._name, self._limits.context, self._stops)
        for chunk in self._wire.stream(body, errand.breaks):
            for choice in chunk.get("choices", ()):
                tokens, reason = tokens_of(choice, request.sampling.logprobs), choice.get("finish_reason")
                for token in tokens[:-1] if reason == "stop" else tokens:  # the last is what ended the answer
                    errand.tell(token)
                if reason in ("stop", "length"):
                    return End(reason)
                if reason is not None:
                    return End("error", f"vLLM ended the answer with {reason!r}")
        raise Unreached(f"vLLM at {self._wire.url} broke an answer off")

    def _put(self, digest: str, place: Path, there: dict[str, Card]) -> None:
        if (card := there.get(digest)) is not None:
            if card.root == str(place):
                return
            self._drop(digest)
        try:
            self._wire.load(digest, str(place))
        except Refused as refused:
            if refused.status != 400 or "already been loaded" not in refused.message:  # by another of us, meanwhile
                self._explain(refused, place)

    def _drop(self, digest: str) -> None:
        try:
            self._wire.unload(digest)
        except Refused as refused:
            if refused.status != 404:
                self._explain(refused, Path(digest))

    def _explain(self, refused: Refused, place: Path) -> NoReturn:
        """Raise what a refusal of vLLM's means here."""
        where = f"vLLM at {self._wire.url}"
        if refused.status == 404:
            raise AdapterFileError(
                f"{where} finds no adapter in {place}; let it see the store under the same path ({refused.message})"
            )
        if refused.status < 500:
            raise RequestError(f"{where} refused {place}: {refused.message}")
        if "max_lora_rank" in refused.message:
            raise SpecError(
                f"{where} was started for lower ranks than that of {place}; start it with --max-lora-rank "
                f"{rank_to_serve(place)} ({refused.message})"
            )
        raise AdapterFileError(
            f"{where} could not load {place}: {refused.message}; is it an adapter of {self._root}, on layers that "
            "vLLM adapts?"
        )

    def _cards(self) -> list[Card]:
        """Return the server's models."""
        try:
            return self._wire.cards()
        except Refused as refused:
            key = "; set LORAKIT_ENGINE_KEY to its key" if refused.status in (401, 403) else "; is it a vLLM server?"
            raise ServingError(f"{self._wire.url}/v1/models: {refused.status} {refused.message}{key}") from refused

    def _base(self, cards: list[Card]) -> Card:
        if (base := next((card for card in cards if card.parent is None), None)) is None:
            raise ServingError(f"vLLM at {self._wire.url} names no base among its models")
        return base

    def _context(self, base: Card) -> int:
        known = [length for length in (self._most, base.context) if length is not None]
        if not known:
            raise ServingError(f"vLLM at {self._wire.url} does not tell its max_model_len; give --context")
        return min(known)

    def _check_routes(self) -> None:
        """Raise where the server takes no adapters: a route that is there minds that the name is missing."""
        try:
            self._wire.unload("")
        except Refused as refused:
            if refused.status in (404, 405):
                raise ServingError(f"vLLM at {self._wire.url} loads no adapters while it runs; {_START}") from refused
