"""Adapters by content: a folder that is named by the sha256 of what lies in it, written once and never changed.

Servers that keep an adapter under a name and a path answer with stale caches once its files change. Here a change is
another digest, hence another path. What is stored is what was examined (arrival.py).
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lorakit.errors import AdapterFileError, UnknownAdapterError, did_you_mean, listing
from lorakit.persist import files
from lorakit.persist.atomic import atomic_directory, write_file, write_pieces
from lorakit.serving.shelf.arrival import MOST_BYTES, Examined, examine, from_tokenizer, stated
from lorakit.serving.shelf.manifest import MANIFEST, File, Manifest, digest_of, read_manifest
from lorakit.serving.shelf.turnstile import one_at_a_time

_log = logging.getLogger("lorakit.serving")
SHORTEST = 8
"""Hexadecimal digits of a digest that may stand for the whole, where no other begins with them."""


class DamagedError(AdapterFileError):
    """A stored adapter that is not what was stored."""


class StoreError(AdapterFileError):
    """A store that cannot be read or written, whichever adapter is asked for."""


class Store:
    """A content-addressed folder of adapters: `root/adapters/<digest>/`, each with its files and `manifest.json`.

    Several processes may use one store; those that change it take turns.

    Raises:
        AdapterFileError: a root that cannot be made or written.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.realpath(root))
        self._adapters = self.root / "adapters"
        with self._telling():
            self._adapters.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix=".", dir=self._adapters, ignore_cleanup_errors=True):
                pass  # said now, and not of each adapter
        with self._alone(wait=False) as alone:
            if alone:
                self._sweep()

    def add(self, folder: Path, *, most_bytes: int = MOST_BYTES) -> Manifest:
        """Store a copy of the adapter in `folder`, or find that it is stored, and return its manifest.

        A `manifest.json` in the folder must agree with the files beside it, and what its maker states is kept.

        Raises:
            AdapterFileError: no adapter, files that are refused, other statements than those stored with the same
                content, or a write that failed and left nothing behind.
        """
        return self.keep(examine(folder, most_bytes=most_bytes))

    def keep(self, found: Examined) -> Manifest:
        """Store an adapter as it was examined, as `add` does; files that changed since are refused."""
        folder, manifest = found.folder, found.manifest
        says = stated(folder, manifest)
        with self._alone():
            place = self._adapters / manifest.digest
            if place.is_dir():
                try:
                    return _agreed(self.verify(manifest.digest), says, folder)
                except DamagedError as damaged:
                    _log.warning("%s; it is stored anew", damaged)
                    self._remove(place)
            manifest = replace(manifest, **(from_tokenizer(folder) | says))
            with atomic_directory(place) as draft:
                for name, source in found.sources.items():
                    _copy(source, draft / name, manifest.files[name])
                write_file(draft / MANIFEST, manifest.text())
                for file in draft.iterdir():
                    file.chmod(0o444)
        return manifest

    def get(self, digest: str) -> Path:
        """Return the folder of a stored adapter; never write into it.

        Raises:
            UnknownAdapterError: a digest that is not stored, or the first digits of several.
        """
        return self._adapters / self._whole(digest)

    def digests(self) -> list[str]:
        """Return the digests of all that is stored, sorted."""
        with self._telling("read"):
            return sorted(name for name in os.listdir(self._adapters) if re.fullmatch("[0-9a-f]{64}", name))

    def manifests(self) -> list[Manifest]:
        """Return the manifests of all that is stored, by digest.

        Raises:
            AdapterFileError: manifests that cannot be read, all of them listed.
        """
        found, broken = [], []
        for digest in self.digests():
            try:
                found.append(read_manifest(self._adapters / digest))
            except AdapterFileError as wrong:
                broken.append(str(wrong))
        if broken:
            raise AdapterFileError(f"remove these from the store, then add them anew:\n{listing(broken)}")
        return found

    def verify(self, digest: str) -> Manifest:
        """Read every file of a stored adapter again, and return its manifest where all is as it was stored.

        Raises:
            AdapterFileError: files that were changed, forged, lost or added; each with expected and found.
        """
        place = self.get(digest)
        try:
            manifest = read_manifest(place)
        except AdapterFileError as unreadable:
            raise DamagedError(f"{unreadable}; delete that folder and add the adapter anew") from unreadable
        wrong = []
        sums = {name: file.sha256 for name, file in manifest.files.items()}
        if (found := digest_of(sums, manifest.chat_template)) != place.name:
            wrong.append(f"{MANIFEST}: its files and template make the digest, expected {place.name}, found {found}")
        if manifest.digest != place.name:
            wrong.append(f"{MANIFEST}: digest, expected {place.name}, found {manifest.digest}")
        here = {file.name for file in place.iterdir()} - {MANIFEST}
        for name in sorted(here | manifest.files.keys()):
            if name not in manifest.files:
                wrong.append(f"{name}: expected no such file, found one")
            elif name not in here:
                wrong.append(f"{name}: expected sha256 {manifest.files[name].sha256}, found no such file")
            elif (found := files.sha256(place / name)) != manifest.files[name].sha256:
                wrong.append(f"{name}: expected sha256 {manifest.files[name].sha256}, found {found}")
        if wrong:
            raise DamagedError(
                f"{place} is not as it was stored; delete that folder and add the adapter anew:\n{listing(wrong)}"
            )
        return manifest

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Hold off whoever prunes the store, in any process, until what is stored inside the block has its name."""
        with ExitStack() as stack:
            with self._telling():
                stack.enter_context(one_at_a_time(self.root / ".naming", shared=True))
            yield

    @contextmanager
    def pruning(self) -> Iterator[None]:
        """Wait until nobody is `naming`, and let nobody begin inside the block."""
        with ExitStack() as stack:
            with self._telling():
                stack.enter_context(one_at_a_time(self.root / ".naming"))
            yield

    def remove(self, digest: str) -> None:
        """Delete a stored adapter; raises `UnknownAdapterError` where there is none."""
        with self._alone():
            self._remove(self.get(digest))

    def _remove(self, place: Path) -> None:
        gone = place.with_name(f".gone-{place.name}")
        with self._telling():
            os.rename(place, gone)  # in one step, so that nobody finds half of it
            shutil.rmtree(gone)

    def _whole(self, digest: str) -> str:
        if re.fullmatch("[0-9a-f]{64}", digest) and (self._adapters / digest).is_dir():
            return digest
        known = self.digests()
        if not re.fullmatch(f"[0-9a-f]{{{SHORTEST},64}}", digest):
            raise UnknownAdapterError(f"{digest!r} is no digest: give {SHORTEST} to 64 hexadecimal digits of one")
        found = [one for one in known if one.startswith(digest)]
        if len(found) > 1:
            raise UnknownAdapterError(f"{digest} begins {len(found)} digests; give more digits:\n{listing(found)}")
        if not found:
            near = did_you_mean(digest, [one[: len(digest)] for one in known])
            raise UnknownAdapterError(f"{digest} is not in the store {self.root} of {len(known)} adapters{near}")
        return found[0]

    def _sweep(self) -> None:
        """Remove what a killed writer left: whoever holds the lock is the only one alive."""
        for leftover in self._adapters.glob(".*"):
            shutil.rmtree(leftover, ignore_errors=True)

    @contextmanager
    def _alone(self, *, wait: bool = True) -> Iterator[bool]:
        """Hold the store's lock; without waiting, say whether it was free."""
        with ExitStack() as stack:
            with self._telling():
                alone = stack.enter_context(one_at_a_time(self.root / ".lock", wait=wait))
            yield alone

    @contextmanager
    def _telling(self, what: str = "written") -> Iterator[None]:
        try:
            yield
        except OSError as failed:
            raise StoreError(
                f"the store {self.root} cannot be {what}: {failed.strerror or failed}; make room there or let it be "
                f"{what}, or choose another (--store)"
            ) from failed


def _agreed(stored: Manifest, stated: dict[str, Any], folder: Path) -> Manifest:
    """Return the stored manifest where the newcomer states nothing else: what is stored does not change."""
    other = [f"{key}: stored {getattr(stored, key)!r}, here {value!r}" for key, value in stated.items()
             if key != "created" and value != getattr(stored, key)]  # fmt: skip
    if other:
        raise AdapterFileError(
            f"{folder} is stored already, as {stored.digest}, with other statements; remove it from the store first:\n"
            f"{listing(other)}"
        )
    return stored


def _copy(source: Path, target: Path, expected: File) -> None:
    """Copy a file, and refuse it where its content is no longer what was examined."""
    handle = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as opened:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise AdapterFileError(f"{source} is no longer a file")
        pieces = iter(lambda: memoryview(opened.read(1 << 20)), memoryview(b""))
        write_pieces(target, _up_to(pieces, expected.bytes), expected.bytes)
    if (found := files.sha256(target)) != expected.sha256:
        raise AdapterFileError(
            f"{source} changed while it was read: expected sha256 {expected.sha256}, found {found}; add it again"
        )


def _up_to(pieces: Iterator[memoryview], most: int) -> Iterator[memoryview]:
    for piece in pieces:
        yield piece[:most]
        if (most := most - len(piece)) < 0:
            return
