"""Between HTTP and the engine: which model a name means, and that its adapter is in memory while someone uses it.

Adapters come in from the store and from folders the operator named, and from nowhere else. A reload is a new digest
and a turn of the pointer: whoever is being answered keeps the adapter he began with.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from lorakit.errors import LorakitError, RequestError, ServingError, UnknownAdapterError, listing, shown
from lorakit.persist.native import NATIVE
from lorakit.persist.peft import CONFIG, PICKLE, WEIGHTS
from lorakit.serving.requests import Engine
from lorakit.serving.shelf.arrival import Examined, examine
from lorakit.serving.shelf.manifest import Manifest
from lorakit.serving.shelf.names import Names, Resolved, Target, is_digest, targets_of
from lorakit.serving.shelf.residents import Residents, Usage
from lorakit.serving.shelf.store import Store

_log = logging.getLogger("lorakit.serving")
__all__ = ["Model", "Registry", "Resolved", "Usage", "Use"]


@dataclass(frozen=True)
class Model:
    """A name that may be asked for: the base (no parent), or what leads to one adapter (its digest) or to several."""

    id: str
    digest: str | None = None
    parent: str | None = None
    arms: Mapping[str, float] = field(default_factory=dict)
    """The weights of an alias that shares its users out."""
    since: str | None = None
    """When its pointer was last turned, ISO 8601 in UTC."""
    loaded: bool = False


class Use(AbstractContextManager[Resolved]):
    """One use of a model: inside the block its adapter is loaded and stays. It may end on another thread."""

    def __init__(self, names: Names, residents: Residents, model: str, user: str | None, request: str | None) -> None:
        self._names, self._residents = names, residents
        self._asked = (model, user, request)
        self._held: list[str] = []

    def __enter__(self) -> Resolved:
        """Return what the model stands for, once it is loaded; raises what `Registry.use` tells."""
        resolved = self._names.resolve(*self._asked)
        if resolved.digest is not None:
            self._residents.hold(resolved.digest)
            self._held.append(resolved.digest)
        return resolved

    def enter_at_once(self) -> Resolved | None:
        """Enter, unless the adapter would have to be loaded: then return None, and hold nothing."""
        resolved = self._names.resolve(*self._asked)
        if resolved.digest is not None:
            if not self._residents.hold_if_here(resolved.digest):
                return None
            self._held.append(resolved.digest)
        return resolved

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the use; a second time does nothing."""
        with suppress(IndexError):  # `pop` is one step, so of two threads one releases
            self._residents.release(self._held.pop())


class Registry:
    """The models of one server, safe to use on any thread.

    Args:
        engine: what serves them.
        store: where their files are kept.
        names: what they are called.
        memory: bytes the adapters in the engine may take together.
        roots: folders that `add` takes adapters from, beside the store.
    """

    def __init__(self, engine: Engine, store: Store, names: Names, *, memory: int, roots: Sequence[Path] = ()) -> None:
        self.engine, self.store, self.names = engine, store, names
        self.roots = tuple(Path(os.path.realpath(root)) for root in roots)
        self._pins: frozenset[str] = frozenset()
        self._scans: dict[str, Path] = {}
        self._residents = Residents(engine, store, memory, self._pinned)
        self._changing = threading.Lock()

    def use(self, model: str, user: str | None = None, request: str | None = None) -> Use:
        """Return a context manager that yields what `model` stands for; on entry it may load, and take its time.

        Raises, on entry:
            UnknownAdapterError: no such model.
            BusyError: no room beside the adapters that are in use.
            AdapterFileError, SpecError, ServingError: an adapter that cannot be served.
        """
        return Use(self.names, self._residents, model, user, request)

    def add(self, name: str, folder: Path, *, replace: bool = False) -> Manifest:
        """Store the adapter in a folder, try it in the engine, and turn `name` to it; what is there already is left.

        Raises:
            RequestError: a folder outside the roots, a name that cannot be, or that has another adapter without
                `replace`.
            AdapterFileError, SpecError: an adapter that cannot be stored or served; the name is as it was.
            BusyError: no room beside the adapters that are in use.
        """
        with self._changing, self.store.naming():
            source = self._inside(folder, (*self.roots, self.store.root))
            return self._added(name, examine(source), replace)

    def scan(self, folder: Path, *, skip: bool = False) -> list[str]:
        """Add each adapter in a folder, also that of a run, under its own folder's name, and return the names.

        A name that had the folder's adapter before, and was turned to another since, stays as it was turned.

        Args:
            folder: holds a folder for each adapter.
            skip: log what is broken, and that nothing is there, instead of raising.

        Raises:
            ServingError: no folder; no adapter in it, or broken ones, all of them listed; the others are added.
        """
        found, broken = [], []
        for name, adapter in adapters_in(folder).items():
            if (other := self._scans.setdefault(name, folder)) != folder:
                broken.append(f"{name}: {other} has one of this name too; rename one of the two folders")
                continue
            try:
                with self._changing, self.store.naming():
                    self._scanned(name, self._inside(adapter, (Path(os.path.realpath(folder)), *self.roots)))
                found.append(name)
            except LorakitError as wrong:
                broken.append(f"{name}: {' '.join(str(wrong).split())}")
        if found and not broken:
            return found
        told = f"{folder} holds no adapter; each is a run's folder, or one with {CONFIG} or {NATIVE}"
        if broken:
            told = (
                f"{folder}: {len(broken)} of {len(broken) + len(found)} adapters cannot be served; repair them, move "
                f"them away, or leave them out (--skip-broken):\n{listing(broken, len(broken) if skip else 12)}"
            )
        if not skip:
            raise ServingError(told)
        _log.warning("%s", told)
        return found

    def point(self, name: str, target: Target) -> None:
        """Turn a name or alias, once every adapter it will lead to is known to load.

        Raises:
            RequestError, UnknownAdapterError: a target that cannot be.
            AdapterFileError, SpecError, BusyError: an adapter that cannot be served now; the pointer is as it was.
        """
        with self._changing, self.store.naming():
            self.names.check(name)
            self._try(target)
            self.names.point(name, target)

    def rollback(self, name: str) -> Target:
        """Turn a name or alias back to its target before this one, and return it; raises as `point` does."""
        with self._changing:
            for before in self.names.history(name)[1:2]:
                self._try(before.target)
            return self.names.rollback(name)

    def remove(self, name: str) -> None:
        """Forget a name or alias; adapters that nothing points to leave memory when their last user is gone.

        The store keeps their files. Raises as `Names.delete` does.
        """
        with self._changing:
            past = {t for turn in self.names.history(name) for t in targets_of(turn.target)}
            self.names.delete(name)
            self._pins -= {name}
            for digest in past - self.names.digests():
                self._residents.leave(digest)

    def prune(self) -> list[Manifest]:
        """Delete the files of adapters that no name or alias can be turned to any more, and return their manifests.

        Whoever is being answered by one keeps it: it is in memory, and stays out of this. Where another server of the
        store is about to name one, this waits for it.

        Raises:
            AdapterFileError: a store that cannot be read or written.
        """
        with self._changing, self.store.pruning():
            kept = self.names.remembered() | self._residents.loaded()
            gone = [one for one in self.store.manifests() if one.digest not in kept]
            for one in gone:
                self.store.remove(one.digest)
            return gone

    def pin(self, name: str) -> None:
        """Load what a name leads to, now, and keep it in memory wherever the name is turned; raises as `use` does."""
        held = []
        with self._changing:
            try:
                for digest in sorted(self.names.digests(name)):
                    self._residents.hold(digest)
                    held.append(digest)
                self._pins |= {name}
            finally:
                for digest in held:
                    self._residents.release(digest)

    def unpin(self, name: str) -> None:
        """Let a name's adapters make room for others again; one that is not pinned is left alone."""
        with self._changing:
            self._pins -= {name}

    def pinned(self, name: str) -> bool:
        """Return whether a name's adapters are kept in memory."""
        return name in self._pins

    def models(self) -> list[Model]:
        """Return what may be asked for: the bases, then every name and alias."""
        loaded, parent = self._residents.loaded(), next(iter(self.names.bases), None)
        made = [Model(base, loaded=True) for base in self.names.bases]
        for name, target in self.names.pointers().items():
            with suppress(UnknownAdapterError):  # it went meanwhile
                digests, since = self.names.digests(name), self.names.history(name)[0].at
                only = next(iter(digests)) if len(digests) == 1 else None
                arms = {} if isinstance(target, str) else dict(target)
                made.append(Model(name, only, parent, arms, since, loaded=digests <= loaded))
        return made

    def lost(self) -> list[str]:
        """Return the names and aliases that lead to an adapter whose files are gone from the store."""
        stored = set(self.store.digests())
        return [name for name in self.names.pointers() if not self.names.digests(name) <= stored]

    def usage(self) -> Usage:
        """Return what the adapters take of the engine's memory."""
        return self._residents.usage()

    def _pinned(self) -> set[str]:
        pinned = set[str]()
        for name in self._pins:
            with suppress(UnknownAdapterError):
                pinned |= self.names.digests(name)
        return pinned

    def _added(self, name: str, found: Examined, replace: bool) -> Manifest:
        self.names.check(name)
        manifest = found.manifest
        present = self.names.pointers().get(name)
        if present not in (None, manifest.digest) and not replace:
            raise RequestError(
                f"{name} is another adapter already ({shown(present)}, this is {manifest.digest[:12]}); replace it, or "
                "choose another name"
            )
        stored = self.store.keep(found)
        if present != stored.digest:
            self._try(stored.digest)
            self.names.point(name, stored.digest)
        return stored

    def _scanned(self, name: str, source: Path) -> None:
        found = examine(source)
        turned_since = False
        with suppress(UnknownAdapterError):
            turned_since = found.manifest.digest in [turn.target for turn in self.names.history(name)[1:]]
        if turned_since:
            folder, now = self.store.keep(found).digest, self.names.pointers()[name]
            if folder != now:
                to = now[:12] if isinstance(now, str) else shown(now)
                _log.warning(
                    "%s stays %s, to which it was turned; its folder holds %s, of before", name, to, folder[:12]
                )
        else:
            self._added(name, found, replace=True)

    def _try(self, target: Target) -> None:
        """Load each adapter that a target leads to, and let go of it; what it does not know is for `Names` to tell."""
        known = self.names.pointers()
        for one in targets_of(target):
            digests = self.names.digests(one) if one in known else {one} if is_digest(one) else set()
            for digest in sorted(digests):
                self._residents.hold(digest)
                self._residents.release(digest)

    def _inside(self, folder: Path, roots: Sequence[Path]) -> Path:
        """Return where a folder really lies, which must be in one of the roots; says nothing of what is elsewhere."""
        try:
            real = Path(os.path.realpath(folder))
        except (OSError, ValueError):  # a NUL in the path
            real = Path()
        if not any(real.is_relative_to(root) for root in roots):
            raise RequestError(
                f"{shown(str(folder))} does not lie where this server takes adapters from: "
                f"{', '.join(map(str, roots))}; put it there, or start the server with its folder as a root"
            )
        return real


def adapters_in(folder: Path) -> dict[str, Path]:
    """Return the adapters in a folder by their folders' names, also those of runs; none of them is read.

    Raises:
        ServingError: no folder, or one that is an adapter or a run itself.
    """
    if not folder.is_dir():
        raise ServingError(f"{folder} is not a folder; give the folder that the adapters' folders lie in")
    if _adapter_in(folder) is not None:
        raise ServingError(
            f"{folder} is itself an adapter or a run; give the folder it lies in, or serve it alone: "
            f"lorakit serve {folder}"
        )
    places = [place for place in sorted(folder.iterdir()) if not place.name.startswith(".")]
    return {place.name: adapter for place in places if (adapter := _adapter_in(place)) is not None}


def _adapter_in(place: Path) -> Path | None:
    """Return the folder of an adapter: this one, or that of a run; None where neither looks like one."""
    for folder in (place, place / "adapter"):
        if folder.is_dir() and any((folder / name).exists() for name in (CONFIG, WEIGHTS, PICKLE, NATIVE)):
            return folder
    return None
