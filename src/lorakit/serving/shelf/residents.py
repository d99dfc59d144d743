"""The adapters that are in the engine's memory: loaded once when first needed, gone when others need their place.

An adapter in use stays: each use counts, and only what nobody uses makes room, the longest unused first. Room is made
before a load, by what the files tell of its size; the engine's own number replaces it afterwards.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field

from lorakit.errors import BusyError, ServingError
from lorakit.serving.requests import Engine
from lorakit.serving.shelf.golden import check_golden
from lorakit.serving.shelf.manifest import Manifest, read_manifest
from lorakit.serving.shelf.store import Store

_RETRY = 1.0  # seconds after which an answer may have ended and freed an adapter


@dataclass(frozen=True)
class Usage:
    """What the engine's memory for adapters holds now, in bytes, and what happened since the start."""

    memory: int
    bytes: int
    adapters: int
    in_use: int
    loads: int
    failures: int
    evictions: int


@dataclass(eq=False)
class _Resident:
    digest: str
    bytes: int
    users: int = 0
    leaving: bool = False
    ready: Future[None] = field(default_factory=Future)


class Residents:
    """Loads adapters of a store into an engine, and keeps their bytes below `memory`.

    Args:
        engine: which holds them.
        store: where their files lie.
        memory: bytes they may take together. A first load whose size the files do not tell may exceed it for a moment.
        pinned: tells the digests that stay though nobody uses them.
    """

    def __init__(self, engine: Engine, store: Store, memory: int, pinned: Callable[[], Collection[str]]) -> None:
        self.engine, self.store, self.memory = engine, store, memory
        self._pinned = pinned
        self._lock = threading.Lock()
        self._here: OrderedDict[str, _Resident] = OrderedDict()  # the longest unused first
        self._known: dict[str, int] = {}  # the bytes of what was loaded and has shown its golden answers
        self._loads = self._failures = self._evictions = 0

    def hold(self, digest: str) -> None:
        """Load an adapter unless it is here, and keep it until `release`; of those who ask at once, one loads.

        Raises:
            UnknownAdapterError: a digest that is not stored.
            BusyError: what is here is all in use, and there is no room beside it.
            ServingError: an adapter larger than the memory.
            AdapterFileError, SpecError: an adapter the engine refuses; it is asked again the next time.
        """
        with self._lock:
            one = self._joined(digest)
        if one is None:
            manifest = read_manifest(self.store.get(digest))
            with self._lock:
                one = self._joined(digest)
                if first := one is None:
                    one = self._entered(digest, manifest)
            if first:
                self._load(one, manifest)
        one.ready.result()

    def hold_if_here(self, digest: str) -> bool:
        """Keep an adapter until `release` where it is loaded already, and return whether it is."""
        with self._lock:
            one = self._here.get(digest)
            return one is not None and one.ready.done() and self._joined(digest) is not None

    def release(self, digest: str) -> None:
        """End one use that `hold` began."""
        with self._lock:
            one = self._here[digest]
            one.users -= 1
            self._here.move_to_end(digest)
            if one.users == 0 and one.leaving:
                self._drop(one)

    def leave(self, digest: str) -> None:
        """Free an adapter's memory, now or when its last user is gone."""
        with self._lock:
            one = self._here.get(digest)
            if one is not None:
                one.leaving = True
                if one.users == 0:
                    self._drop(one)

    def loaded(self) -> set[str]:
        """Return the digests of the adapters that are here."""
        with self._lock:
            return {digest for digest, one in self._here.items() if one.ready.done()}

    def usage(self) -> Usage:
        """Return what is held now."""
        with self._lock:
            here = self._here.values()
            total, used = sum(one.bytes for one in here), sum(one.users > 0 for one in here)
            return Usage(self.memory, total, len(here), used, self._loads, self._failures, self._evictions)

    def _joined(self, digest: str) -> _Resident | None:
        """Return a resident with one user more, or None where it is not here."""
        one = self._here.get(digest)
        if one is not None:
            one.users += 1
            one.leaving = False
        return one

    def _entered(self, digest: str, manifest: Manifest) -> _Resident:
        """Return a new resident with one user, whose place is made and who must be loaded."""
        # In fp32, as engines compute with them, where the files are narrower.
        size = self._known.get(digest) or max(manifest.bytes, 4 * manifest.parameters)
        self._make_room(digest, size)
        one = self._here[digest] = _Resident(digest, size, users=1)
        return one

    def _load(self, one: _Resident, manifest: Manifest) -> None:
        """Load a resident; a failure reaches all who wait for it, and is forgotten with it."""
        loaded = False
        try:
            self.store.verify(one.digest)
            size = self.engine.load(one.digest, self.store.get(one.digest)).bytes
            loaded = True
            if one.digest not in self._known:
                check_golden(self.engine, manifest)
            with self._lock:
                one.bytes = self._known[one.digest] = size
                self._make_room(one.digest, 0)
                self._loads += 1
        except BaseException as failed:
            if loaded:
                self.engine.unload(one.digest)
            with self._lock:
                del self._here[one.digest]
                self._failures += 1
            one.ready.set_exception(failed)
        else:
            one.ready.set_result(None)

    def _make_room(self, digest: str, size: int) -> None:
        """Drop the longest unused until `size` bytes fit, or raise and drop none."""
        pinned = self._pinned()
        total = size + sum(one.bytes for one in self._here.values())
        if total <= self.memory:
            return
        idle = [one for one in self._here.values() if one.users == 0 and one.digest not in pinned]
        if total - sum(one.bytes for one in idle) > self.memory:
            alone = size or self._here[digest].bytes
            if alone > self.memory:
                raise ServingError(
                    f"adapter {digest[:12]} takes {alone:,} bytes, and all adapters together may take {self.memory:,}; "
                    "give them more memory"
                )
            raise BusyError(
                f"adapter {digest[:12]} takes {alone:,} bytes, and of {self.memory:,} the rest is in use or pinned; "
                f"try again in {_RETRY:g} s",
                retry_after=_RETRY,
            )
        for one in idle:
            if total <= self.memory:
                break
            total -= one.bytes
            self._evictions += 1
            self._drop(one)

    def _drop(self, one: _Resident) -> None:
        # Under the lock, so that nobody loads it anew between the two.
        del self._here[one.digest]
        self.engine.unload(one.digest)
