"""API keys: who may ask, and for which models. The file holds hashes, so that whoever reads it can use none.

A key is 256 random bits, so one round of SHA-256 keeps it: no list of passwords leads back to it. The file may be
read by others for the same reason, but not written by them: who can add a line can let himself in.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from lorakit.core.jsontext import too_deep
from lorakit.errors import AccessError, ServingError, did_you_mean, listing, looked_in, shown
from lorakit.serving.shelf.names import begins_digest

Scope = Literal["infer", "admin", "metrics"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "lora-"
_FIELDS = ("name", "sha256", "scopes", "models", "tenant")
_HASH = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)


@dataclass(frozen=True)
class Key:
    """Who asks.

    Args:
        name: of the key, for people; it is no secret.
        scopes: what it may do: `infer` asks models, `admin` changes what is served, `metrics` reads the counters.
        models: globs of the names of models it may ask, as `support-*`.
        tenant: who shares the server's time as one; several keys may have one tenant.
    """

    name: str
    scopes: frozenset[Scope] = frozenset(("infer",))
    models: tuple[str, ...] = ("*",)
    tenant: str = ""

    def need(self, scope: Scope) -> None:
        """Raise `AccessError` unless this key has `scope`."""
        if scope not in self.scopes:
            has = ", ".join(sorted(self.scopes))
            raise AccessError(f"the key '{self.name}' may not do this: it needs the scope {scope} and has {has}")

    def may_ask(self, model: str) -> bool:
        """Return whether this key may ask `model`: by its name, or as a version or alias `name@...` of one it may.

        A digest is any adapter's and no name, so `*` alone or the digest itself gives it away.
        """
        if begins_digest(model):
            return "*" in self.models or model in self.models
        return any(fnmatchcase(name, glob) for glob in self.models for name in {model, model.partition("@")[0]})

    def need_model(self, model: str) -> None:
        """Raise `AccessError` unless this key may ask `model`."""
        if not self.may_ask(model):
            allowed = ", ".join(self.models)
            raise AccessError(f"the key '{self.name}' may not ask the model {shown(model)}; it may ask {allowed}")


ANYONE = Key("anyone", frozenset(SCOPES))
"""Who asks where no file of keys was given; the server then listens to its own machine alone."""


class Keys:
    """The keys of a server; without any, everybody on this machine may do everything."""

    def __init__(self, keys: Mapping[str, Key] | None = None) -> None:
        self._keys = None if keys is None else [(bytes.fromhex(digest), key) for digest, key in keys.items()]

    @property
    def open(self) -> bool:
        """Whether no key is asked for."""
        return self._keys is None

    def find(self, secret: str | None) -> Key:
        """Return whose secret this is; every key is compared with, so that the time tells nothing.

        Raises:
            AccessError: no secret, or one that is not known.
        """
        if self._keys is None:
            return ANYONE
        if not secret:
            raise AccessError("this server asks for an API key; send the header 'Authorization: Bearer lora-...'")
        given = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
        found = [key for digest, key in self._keys if hmac.compare_digest(digest, given)]
        if not found:
            raise AccessError("this API key is not known here; ask the server's owner for one")
        return found[0]


def new_key(
    name: str, scopes: Sequence[Scope] = ("infer",), models: Sequence[str] = ("*",), tenant: str = ""
) -> tuple[str, dict[str, Any]]:
    """Return a new secret, which is shown once, and the entry for the file of keys.

    Raises:
        ServingError: a name, scope or glob that no file of keys may have.
    """
    secret = PREFIX + secrets.token_urlsafe(32)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    entry = {"name": name, "sha256": digest, "scopes": list(scopes), "models": list(models)}
    if tenant:
        entry["tenant"] = tenant
    if problems := _problems(entry):
        raise ServingError(f"no such key can be made:\n{listing(problems)}")
    return secret, entry


def add_key(
    file: Path, name: str, scopes: Sequence[Scope] = ("infer",), models: Sequence[str] = ("*",), tenant: str = ""
) -> str:
    """Make a key, add its entry to a file of keys, new or old, in one step, and return its secret.

    Raises:
        ServingError: a name that is taken, what no file of keys may have, or a file that cannot be read or written.
    """
    entries = _loaded(file) if file.exists() else []
    if any(entry["name"] == name for entry in entries):
        raise ServingError(f"{file} has a key '{name}' already; choose another name, or take that one out first")
    secret, entry = new_key(name, scopes, models, tenant)
    draft = file.with_name(f".{file.name}.new-{secrets.token_hex(4)}")
    try:
        mode = stat.S_IMODE(file.stat().st_mode) if file.exists() else 0o600
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as opened:
            opened.write(_text(file, [*entries, entry]))
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(draft, file)
    except OSError as failed:
        raise ServingError(f"the file of keys {file} could not be written: {failed.strerror or failed}") from failed
    finally:
        draft.unlink(missing_ok=True)
    return secret


def load_keys(file: Path) -> Keys:
    """Return the keys of a JSON or YAML file `{keys: [{name, sha256, scopes, models, tenant}]}`.

    Raises:
        ServingError: a file that cannot be read, that others may write, or with faults (all of them listed).
    """
    entries = _loaded(file)
    if not entries:
        raise ServingError(f"{file} holds no key, so nobody could ask; add one, or leave the file out to serve openly")
    return Keys({entry["sha256"]: _key(entry) for entry in entries})


def _loaded(file: Path) -> list[dict[str, Any]]:
    """Return the entries of a file of keys, each without faults."""
    try:
        mode = file.stat().st_mode
        text = file.read_bytes()
    except OSError as failed:
        reason = failed.strerror or failed
        raise ServingError(f"the file of keys {file} cannot be read: {reason}{looked_in(file)}") from failed
    if os.name == "posix" and mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ServingError(f"others may write {file}, and so give themselves keys; run: chmod go-w {file}")
    entries = _entries(file, text)
    problems = [f"key {number}: {what}" for number, entry in enumerate(entries, 1) for what in _problems(entry)]
    for field in ("name", "sha256"):
        values = [entry.get(field) for entry in entries if isinstance(entry, dict)]
        problems += [
            f"key {number}: has the {field} of key {values.index(value) + 1}; each key needs its own"
            for number, value in enumerate(values, 1)
            if isinstance(value, str) and values.index(value) + 1 < number
        ]
    if problems:
        raise ServingError(f"{file} has faults:\n{listing(problems)}")
    return entries


def _text(file: Path, entries: Sequence[Mapping[str, Any]]) -> str:
    """Return the content of a file of keys; where the old one is YAML, as it stands with the new entry after it."""
    whole = {"keys": list(entries)}
    if file.suffix == ".json":
        return json.dumps(whole, indent=2) + "\n"
    added = yaml.safe_dump([entries[-1]], sort_keys=False)
    before = file.read_text(encoding="utf-8").rstrip("\n") + "\n" if file.exists() else "keys:\n"
    for indent in ("", "  "):  # so its comments stay, whichever way its list is written
        text = before + textwrap.indent(added, indent)
        with suppress(yaml.YAMLError):
            if yaml.safe_load(text) == whole:
                return text
    return yaml.safe_dump(whole, sort_keys=False)


def _entries(file: Path, text: bytes) -> list[Any]:
    try:
        found = yaml.safe_load(text)  # JSON is YAML
        deep = too_deep(found)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as bad:
        raise ServingError(f"{file} is neither JSON nor YAML: {str(bad).splitlines()[0]}") from None
    if deep or not isinstance(found, dict) or list(found) != ["keys"] or not isinstance(found["keys"], list):
        raise ServingError(f"{file} must hold one field 'keys', a list of keys with {', '.join(_FIELDS)}")
    entries: list[Any] = found["keys"]
    return entries


def _problems(entry: Any) -> list[str]:
    """Return what is wrong with one entry of the file."""
    if not isinstance(entry, dict):
        return [f"is {shown(entry)}, expected the fields {', '.join(_FIELDS)}"]
    found = [f"unknown field {shown(k)}{did_you_mean(str(k), _FIELDS)}" for k in entry if k not in _FIELDS]
    if "key" in entry or "secret" in entry:
        found.append("the file holds hashes alone, never a key itself; make a new key, this one was written down")
    if not isinstance(name := entry.get("name"), str) or not _NAME.fullmatch(name):
        found.append(f"name is {shown(name)}, expected up to 64 letters, digits, dots, dashes or underscores")
    if not isinstance(digest := entry.get("sha256"), str) or not _HASH.fullmatch(digest):
        found.append("sha256 must be the 64 hexadecimal digits of the key's SHA-256, in small letters")
    scopes = entry.get("scopes", ["infer"])
    if not isinstance(scopes, list) or not scopes or (unknown := [s for s in scopes if s not in SCOPES]):
        near = did_you_mean(str(unknown[0]), SCOPES) if isinstance(scopes, list) and scopes else ""
        found.append(f"scopes is {shown(scopes)}, expected a list of {', '.join(SCOPES)}{near}")
    models = entry.get("models", ["*"])
    if not isinstance(models, list) or not models or not all(isinstance(g, str) and g for g in models):
        found.append(f"models is {shown(models)}, expected a list of names or globs such as 'support-*'")
    if not isinstance(tenant := entry.get("tenant", ""), str):
        found.append(f"tenant is {shown(tenant)}, expected a name")
    return found


def _key(entry: Mapping[str, Any]) -> Key:
    """Return the key of an entry without faults; keys without a tenant share nothing but their name."""
    scopes = frozenset(entry.get("scopes", ["infer"]))
    return Key(entry["name"], scopes, tuple(entry.get("models", ["*"])), entry.get("tenant") or entry["name"])
