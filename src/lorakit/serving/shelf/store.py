"""Adapters by content: a folder that is named by the sha256 of what lies in it, written once and never changed.

Servers that keep an adapter under a name and a path answer with stale caches once its files change. Here a change is
another digest, hence another path. Strangers' folders come in by this door, so nothing but safetensors and JSON is
read, no link leads out, and what is stored is what was checked.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lorakit import persist
from lorakit.core.state import AdapterState
from lorakit.errors import AdapterFileError, UnknownAdapterError, did_you_mean, listing, looked_in
from lorakit.persist import files
from lorakit.persist.atomic import atomic_directory, write_file, write_pieces
from lorakit.persist.native import NATIVE
from lorakit.persist.peft import CONFIG, NOTE, WEIGHTS
from lorakit.serving.shelf.manifest import MANIFEST, STATED, TEMPLATE, File, Manifest, digest_of, read_manifest
from lorakit.serving.shelf.turnstile import one_at_a_time

_log = logging.getLogger("lorakit.serving")
MOST_BYTES = 4 << 30
SHORTEST = 8
"""Hexadecimal digits of a digest that may stand for the whole, where no other begins with them."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
_READ, _BESIDE = (".safetensors", ".json"), (".md", ".txt", ".jinja", ".model")
_NAME = re.compile(r"[A-Za-z0-9._][A-Za-z0-9._ +-]{0,127}")
_MOST_TEMPLATE, _MOST_MANIFEST = 1 << 20, 16 << 20  # bytes


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
        stated = _stated(folder, manifest)
        with self._alone():
            place = self._adapters / manifest.digest
            if place.is_dir():
                try:
                    return _agreed(self.verify(manifest.digest), stated, folder)
                except DamagedError as damaged:
                    _log.warning("%s; it is stored anew", damaged)
                    self._remove(place)
            manifest = replace(manifest, **(_from_tokenizer(folder) | stated))
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


def describe(folder: Path, *, most_bytes: int = MOST_BYTES) -> Manifest:
    """Return the manifest of an adapter that is not stored, for its maker to add statements to.

    Raises:
        AdapterFileError: no adapter, or files that are refused.
    """
    return replace(examine(folder, most_bytes=most_bytes).manifest, **_from_tokenizer(folder))


def adapter_files(folder: Path, most_bytes: int = MOST_BYTES) -> dict[str, Path]:
    """Return the files that make the adapter in a folder, by name, without reading one.

    Raises:
        AdapterFileError: listing each pickle, link out of the folder, odd name and other file that is refused.
    """
    place = Path(os.path.realpath(folder))
    if not place.is_dir():
        what = "is a file; give the adapter's folder" if place.exists() else "does not exist"
        raise AdapterFileError(f"{folder} {what}{looked_in(Path(folder))}")
    try:
        names = sorted(os.listdir(place))
    except OSError as failed:
        raise AdapterFileError(f"{folder} could not be read: {failed.strerror or failed}") from failed
    if refused := [f"{name!r}: {why}" for name in names if (why := _refusal(place, name)) is not None]:
        raise AdapterFileError(
            f"{folder}: a served adapter is safetensors and JSON alone, and here is\n{listing(refused)}"
        )
    wanted = (NATIVE,) if NATIVE in names else (CONFIG, WEIGHTS, NOTE)
    found = {name: Path(os.path.realpath(place / name)) for name in wanted if name in names}
    size = sum(file.stat().st_size for file in found.values())
    if size > most_bytes:
        raise AdapterFileError(f"{folder} holds {size:,} bytes, and at most {most_bytes:,} are taken")
    return found


def _refusal(place: Path, name: str) -> str | None:
    """Return why a folder with this entry is not taken, or None."""
    entry = place / name
    if not _NAME.fullmatch(name):
        return "an odd name; use letters, digits and ._-"
    target = Path(os.path.realpath(entry))
    if entry.is_symlink() and not target.is_relative_to(place):
        return f"a link out of the folder, to {target}; copy the folder with `cp -rL`"
    if name.startswith("."):
        return None
    if target.is_dir():
        inner = (
            " with an adapter; give that folder" if (target / CONFIG).exists() else "; give the adapter's folder alone"
        )
        return f"a folder{inner}"
    if not target.is_file():
        return "not a file" if target.exists() else "a link to nothing"
    if target.suffix.lower() in _PICKLES or entry.suffix.lower() in _PICKLES:
        return (
            "a pickle, which can hold code; convert it to safetensors, or move it away if it is no part of the adapter"
        )
    if entry.suffix not in (*_READ, *_BESIDE) and entry.stem not in ("LICENSE", "LICENCE", "NOTICE"):
        return "of no kind an adapter has; move it away"
    return None


@dataclass(frozen=True)
class Examined:
    """An adapter that is not stored yet: its folder, what its files tell of it, and where they lie."""

    folder: Path
    manifest: Manifest
    sources: Mapping[str, Path]


def examine(folder: Path, *, most_bytes: int = MOST_BYTES) -> Examined:
    """Return what the files of an adapter tell of it, each of them read once.

    Raises:
        AdapterFileError: no adapter, or files that are refused.
    """
    sources = adapter_files(folder, most_bytes)
    sums = {name: File(files.sha256(source), source.stat().st_size) for name, source in sources.items()}
    state = persist.load(folder)
    manifest = Manifest(
        digest=digest_of({name: file.sha256 for name, file in sums.items()}, _template(folder)),
        files=sums,
        base=state.base,
        method=state.spec.name,
        rank=_rank(state),
        parameters=state.parameters,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        purpose=state.purpose,
    )
    return Examined(folder, manifest, sources)


def _rank(state: AdapterState) -> int | None:
    """Return the largest rank of an adapter's updates; a method that wraps another has the other's."""
    ranks = []
    for update in state.updates:
        method: Any = update.method
        while not hasattr(method, "rank") and hasattr(method, "inner"):
            method = method.inner
        if isinstance(rank := getattr(method, "rank", None), int):
            ranks.append(rank)
    return max(ranks, default=None)


def _stated(folder: Path, measured: Manifest) -> dict[str, Any]:
    """Return what the maker's manifest in a folder states; raises where it contradicts the files beside it."""
    if not (file := Path(folder) / MANIFEST).exists():
        return {}
    if (size := file.stat().st_size) > _MOST_MANIFEST:
        raise AdapterFileError(f"{file} holds {size:,} bytes, and at most {_MOST_MANIFEST:,} are taken")
    theirs = read_manifest(Path(folder))
    wrong = []
    for name in sorted(theirs.files.keys() | measured.files.keys()):
        expected, found = theirs.files.get(name), measured.files.get(name)
        if expected != found:
            wrong.append(f"{name}: expected {expected or 'no such file'}, found {found or 'none'}")
    for key in ("digest", "base", "method", "rank", "parameters", "purpose"):
        if not wrong and getattr(theirs, key) != getattr(measured, key):
            wrong.append(f"{key}: expected {getattr(theirs, key)}, found {getattr(measured, key)}")
    if wrong:
        raise AdapterFileError(f"{folder} is not what its {MANIFEST} says; get it again:\n{listing(wrong)}")
    return {key: value for key in (*STATED, "created") if (value := getattr(theirs, key))}


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


def _from_tokenizer(folder: Path) -> dict[str, Any]:
    """Return what the tokenizer's files in a folder tell, where there are any."""
    place, found = Path(folder), dict[str, Any]()
    if (place / "tokenizer.json").exists():
        found["base_tokenizer"] = files.sha256(place / "tokenizer.json")
    template: Any = None
    if (jinja := place / TEMPLATE).exists() and jinja.stat().st_size <= _MOST_TEMPLATE:
        template = jinja.read_text(encoding="utf-8", errors="replace")
    elif (config := place / "tokenizer_config.json").exists() and config.stat().st_size <= _MOST_MANIFEST:
        template = files.read_json(config).get("chat_template")
    if isinstance(template, str) and template:
        found["chat_template"] = template
    return found


def _template(folder: Path) -> str | None:
    """Return what conversations are read by: what the maker's manifest states, or the tokenizer's files."""
    theirs = read_manifest(Path(folder)).chat_template if (Path(folder) / MANIFEST).exists() else None
    found: str | None = theirs or _from_tokenizer(folder).get("chat_template")
    return found


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
