"""What an adapter is, beside its files: checksums, base, method, and what its maker says of it.

Half of a manifest is measured from the files and follows from them. The other half is stated by the maker: scores, the
chat template, and golden prompts with the tokens that greedy decoding gave, which a server repeats before it answers.
The digest covers the files alone, so a statement can be forged where a file cannot.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.core.state import Base, Purpose
from lorakit.errors import AdapterFileError
from lorakit.persist.files import read_json, to_json
from lorakit.serving.shelf.typed import Mistyped, mapping, maybe, number, record, several, sha256, text, whole

MANIFEST = "manifest.json"
VERSION = 1
MOST_GOLDEN = 8
TEMPLATE = "chat_template.jinja"
STATED = ("base_config", "base_tokenizer", "chat_template", "evaluation", "golden", "licence")
"""The fields that no file of the adapter tells; their makers do."""


@dataclass(frozen=True)
class File:
    """A file as it must be found again."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Golden:
    """A prompt and the tokens that greedy decoding went on with where the adapter was made."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """An adapter as a server knows it.

    Args:
        digest: its name by content, see `digest_of`.
        files: the adapter's files by name.
        base: the base it was trained on, with a few of its weights.
        method: as `lora` or `dora`; `none` where parts of the base were trained and nothing else.
        rank: the largest of its updates, None for methods without one.
        parameters: stored values.
        created: when it was stored, ISO 8601 in UTC.
        base_config, base_tokenizer: sha256 of the base's config.json and tokenizer.json.
        purpose: what it was trained for, as its rows are read.
        chat_template: the Jinja text that makes a prompt of messages.
        evaluation: scores by name.
        golden: prompts to check a server with, 8 at most.
        licence: as its maker names it.

    Raises:
        AdapterFileError: golden prompts that are too many or empty.
    """

    digest: str
    files: Mapping[str, File]
    base: Base
    method: str
    rank: int | None
    parameters: int
    created: str
    base_config: str | None = None
    base_tokenizer: str | None = None
    purpose: Purpose | None = None
    chat_template: str | None = None
    evaluation: Mapping[str, float] = field(default_factory=dict)
    golden: tuple[Golden, ...] = ()
    licence: str | None = None

    def __post_init__(self) -> None:
        if len(self.golden) > MOST_GOLDEN:
            raise AdapterFileError(f"golden: {len(self.golden)} prompts, and a load waits for each; give {MOST_GOLDEN}")
        for index, golden in enumerate(self.golden):
            if not golden.prompt or not golden.tokens:
                raise AdapterFileError(f"golden[{index}]: needs a prompt and the tokens that follow, at least one each")

    @property
    def bytes(self) -> int:
        """Return the bytes of the adapter's files."""
        return sum(file.bytes for file in self.files.values())

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as JSON-ready values, with a format version."""
        return {
            "version": VERSION,
            "digest": self.digest,
            "created": self.created,
            "files": {name: {"sha256": f.sha256, "bytes": f.bytes} for name, f in sorted(self.files.items())},
            "base": {
                "name": self.base.name,
                "probes": {path: list(values) for path, values in self.base.probes.items()},
                "config": self.base_config,
                "tokenizer": self.base_tokenizer,
            },
            "method": self.method,
            "rank": self.rank,
            "parameters": self.parameters,
            "purpose": self.purpose and self.purpose.to_json(),
            "chat_template": self.chat_template,
            "evaluation": dict(self.evaluation),
            "golden": [{"prompt": list(g.prompt), "tokens": list(g.tokens)} for g in self.golden],
            "licence": self.licence,
        }

    @classmethod
    def from_json(cls, values: Any) -> Manifest:
        """Return the manifest that `to_json` wrote.

        Raises:
            AdapterFileError: another version, or a key that is unknown, missing or of another type; names the key.
        """
        try:
            return _manifest(values)
        except Mistyped as wrong:
            raise AdapterFileError(str(wrong)) from None

    def text(self) -> str:
        """Return the content of its file."""
        return to_json(self.to_json())


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest in a folder; raises `AdapterFileError` that names the file and the key."""
    values = read_json(folder / MANIFEST)
    try:
        return Manifest.from_json(values)
    except AdapterFileError as wrong:
        raise AdapterFileError(f"{folder / MANIFEST}: {wrong}") from wrong.__cause__


def digest_of(sums: Mapping[str, str], template: str | None = None) -> str:
    """Return the digest of an adapter from the sha256 of each of its files, by name, and its chat template.

    It is the sha256 of one line `<sha256>  <name>` a file, sorted by name: what
    `sha256sum adapter_config.json adapter_model.safetensors lorakit.json | sha256sum` prints in the adapter's folder.
    A template counts as `chat_template.jinja`, wherever it stood: with another one the same weights answer otherwise.
    """
    if template is not None:
        sums = {**sums, TEMPLATE: hashlib.sha256(template.encode("utf-8", "replace")).hexdigest()}
    return hashlib.sha256("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()).hexdigest()


def _manifest(values: Any) -> Manifest:
    if isinstance(values, dict) and "version" in values and values["version"] != VERSION:
        raise Mistyped.at("version", f"{VERSION}, which this lorakit reads", values["version"])
    found = _SHAPE(values, "")
    base = found.pop("base")
    del found["version"]
    probes = Base(base["name"], base["probes"])
    return Manifest(**found | {"base": probes}, base_config=base["config"], base_tokenizer=base["tokenizer"])


def _file(value: Any, key: str) -> File:
    return File(**record({"sha256": sha256, "bytes": whole})(value, key))


def _golden(value: Any, key: str) -> Golden:
    return Golden(**record({"prompt": several(whole), "tokens": several(whole)})(value, key))


def _purpose(value: Any, key: str) -> Purpose:
    return Purpose(**record({"task": text, "format": text, "separator": maybe(_any_text), "labels": several(text)})(
        value, key
    ))  # fmt: skip


def _any_text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise Mistyped.at(key, "text", value)
    return value


_BASE = {
    "name": maybe(text),
    "probes": mapping(several(number)),
    "config": maybe(sha256),
    "tokenizer": maybe(sha256),
}
_SHAPE = record(
    {
        "version": whole,
        "digest": sha256,
        "created": text,
        "files": mapping(_file),
        "base": record(_BASE),
        "method": text,
        "rank": maybe(whole),
        "parameters": whole,
        "purpose": maybe(_purpose),
        "chat_template": maybe(text),
        "evaluation": mapping(number),
        "golden": several(_golden),
        "licence": maybe(text),
    }
)
