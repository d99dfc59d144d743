"""What lies in a folder that wants to be served: safetensors and JSON alone, no link out of it, and what they tell.

Strangers' folders come in by this door, and nothing of them is believed that was not looked at.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lorakit import persist
from lorakit.core.state import AdapterState
from lorakit.errors import AdapterFileError, listing, looked_in
from lorakit.persist import files
from lorakit.persist.native import NATIVE
from lorakit.persist.peft import CONFIG, NOTE, WEIGHTS
from lorakit.serving.shelf.manifest import MANIFEST, STATED, TEMPLATE, File, Manifest, digest_of, read_manifest

MOST_BYTES = 4 << 30
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
_READ, _BESIDE = (".safetensors", ".json"), (".md", ".txt", ".jinja", ".model")
_NAME = re.compile(r"[A-Za-z0-9._][A-Za-z0-9._ +-]{0,127}")
_MOST_TEMPLATE, _MOST_MANIFEST = 1 << 20, 16 << 20  # bytes


def describe(folder: Path, *, most_bytes: int = MOST_BYTES) -> Manifest:
    """Return the manifest of an adapter that is not stored, for its maker to add statements to.

    Raises:
        AdapterFileError: no adapter, or files that are refused.
    """
    return replace(examine(folder, most_bytes=most_bytes).manifest, **from_tokenizer(folder))


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


def stated(folder: Path, measured: Manifest) -> dict[str, Any]:
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


def from_tokenizer(folder: Path) -> dict[str, Any]:
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
    found: str | None = theirs or from_tokenizer(folder).get("chat_template")
    return found
