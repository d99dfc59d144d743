"""Names and aliases: pointers to digests, in one file that a person can read and that outlives a kill.

A name (`support`) points to a digest. An alias (`support@prod`) points to a digest, to another pointer, or to weighted
arms for a test of one against the other. What is asked for and not known is an error: the base never answers in its
place.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lorakit.core.jsontext import JsonFault, parse_json
from lorakit.errors import RequestError, ServingError, UnknownAdapterError, did_you_mean, listing, shown
from lorakit.serving.shelf.turnstile import one_at_a_time
from lorakit.serving.shelf.typed import Mistyped, mapping, number, record, several, text, whole

Target = str | Mapping[str, float]
"""A digest or a pointer; or arms: pointers or digests with their weights."""
_log = logging.getLogger("lorakit.serving")
KEPT = 20
"""Targets that a pointer remembers, the one it has included."""
VERSION = 1
_LONGEST = 128
_WORD = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/-]*[A-Za-z0-9._-])?")
_DIGEST, _PART = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{8,64}")


@dataclass(frozen=True)
class Resolved:
    """What a model's name stands for: a digest (None is the base), the pointer it was found by, and the arm drawn."""

    digest: str | None
    name: str
    arm: str | None = None


@dataclass(frozen=True)
class Turn:
    """What a pointer was turned to, and when, ISO 8601 in UTC."""

    target: Target
    at: str


_Turns = dict[str, tuple[Turn, ...]]  # the present target first


class Names:
    """The pointers of one server, safe to use on any thread.

    Which arm a user gets is a race of exponential clocks (weighted rendezvous hashing): each arm's time is
    `-ln(u) / weight` with `u` in (0, 1) from sha256(alias, user, arm), and the earliest wins. So shares follow weights,
    a user keeps his arm, and where weights change only those move who must: all of them to arms whose share grew.

    Args:
        path: the JSON file; it is made with the first pointer.
        bases: names under which the base itself is asked for.

    Raises:
        ServingError: a file that is corrupt or holds pointers that cannot be, with what to do.
    """

    def __init__(self, path: Path, bases: Sequence[str] = ()) -> None:
        self.path, self.bases = Path(path), tuple(bases)
        self._writing = threading.Lock()
        self._seen = _stamp(self.path)
        self._turns = self._read()  # never changed, only exchanged: readers need no lock

    def resolve(self, model: str, user: str | None = None, request: str | None = None) -> Resolved:
        """Return what `model` stands for: a base, `name`, `base:name`, `name@alias`, `name@digest` or a digest.

        Of a digest the first 8 digits are enough, where no other version of that name, or adapter here, begins so.

        Args:
            model: as a request names it.
            user: keeps its arm of an alias, as long as the alias has it.
            request: draws the arm where there is no user.

        Raises:
            UnknownAdapterError: no such model, with the nearest there is.
            RequestError: an alias with arms, and neither user nor request to draw one by.
        """
        if model in self.bases:
            return Resolved(None, model)
        turns = self._now()
        name = next((model[len(base) + 1 :] for base in self.bases if model.startswith(f"{base}:")), model)
        if name not in turns:
            return self._version(turns, name)
        arm, target = None, turns[name][0].target
        while not isinstance(target, str) or target in turns:
            if isinstance(target, str):
                target = turns[target][0].target
            else:
                arm = target = _drawn(name, target, user, request)
        return Resolved(target, name, arm)

    def check(self, name: str) -> None:
        """Raise `RequestError` unless `name` could be a name or alias here."""
        _check_word(name, self.bases)

    def point(self, name: str, target: Target) -> None:
        """Turn a pointer, new or old, to a target; turning it to where it points already changes nothing.

        Raises:
            RequestError: a name or a target that cannot be, or a circle.
            UnknownAdapterError: a target that is no pointer here.
        """
        with self._changing() as turns:
            _turn(turns, name, target)

    def rollback(self, name: str) -> Target:
        """Turn a pointer back to the target before this one, which is a turn itself, and return that target.

        Raises:
            UnknownAdapterError: no such pointer, or a former target that is gone.
            RequestError: a pointer that had no other target.
        """
        with self._changing() as turns:
            past = _past(turns, name)
            if len(past) < 2:
                raise RequestError(f"{name} had no target before this one; point it to another")
            _turn(turns, name, past[1].target)
            return past[1].target

    def delete(self, name: str) -> None:
        """Forget a pointer and its history.

        Raises:
            UnknownAdapterError: no such pointer.
            RequestError: a pointer that others point to.
        """
        with self._changing() as turns:
            _past(turns, name)
            if leaning := sorted(other for other, past in turns.items() if name in targets_of(past[0].target)):
                raise RequestError(f"{', '.join(leaning)} points to {name}; point it elsewhere or delete it first")
            del turns[name]

    def history(self, name: str) -> tuple[Turn, ...]:
        """Return the targets a pointer had, the present one first; raises `UnknownAdapterError`."""
        return _past(self._now(), name)

    def remembered(self) -> set[str]:
        """Return every digest that a pointer points to or did, as far back as it can be turned, by the file itself."""
        with self._writing:
            pointers = self._read() if self.path.exists() else self._turns
        turns = [turn for past in pointers.values() for turn in past]
        return {target for turn in turns for target in targets_of(turn.target) if is_digest(target)}

    def pointers(self) -> dict[str, Target]:
        """Return every pointer with its present target, by name."""
        return {name: past[0].target for name, past in sorted(self._now().items())}

    def digests(self, name: str | None = None) -> set[str]:
        """Return the digests that a pointer leads to now, over all arms; without a name, those of every pointer.

        Raises:
            UnknownAdapterError: no such pointer.
        """
        turns = self._now()
        if name is not None:
            _past(turns, name)
        ahead, found = list(turns if name is None else [name]), set[str]()
        while ahead:
            for target in targets_of(turns[ahead.pop()][0].target):
                if target in turns:
                    ahead.append(target)
                else:
                    found.add(target)
        return found

    def _version(self, turns: _Turns, asked: str) -> Resolved:
        """Return the adapter that `asked` names by digest; of a name, among the versions it and its aliases had."""
        name, _, tag = asked.rpartition("@")
        if begins_digest(tag):
            of = [past for key, past in turns.items() if not name or key.partition("@")[0] == name]
            digests = {t for past in of for turn in past for t in targets_of(turn.target) if _DIGEST.fullmatch(t)}
            found = sorted(digest for digest in digests if digest.startswith(tag))
            if len(found) > 1:
                raise UnknownAdapterError(f"{asked} begins {len(found)} digests; give more digits:\n{listing(found)}")
            if found:
                return Resolved(found[0], name or found[0])
        served = [*self.bases, *turns]
        more = f" and {len(served) - 8} more" if len(served) > 8 else ""
        near = did_you_mean(asked, served) or (f"; served are {', '.join(sorted(served)[:8])}{more}" if served else "")
        raise UnknownAdapterError(f"{shown(asked)} is not served here{near}")

    @contextmanager
    def _changing(self) -> Iterator[_Turns]:
        """Yield the pointers to change; they are written and in force once they were found to be possible."""
        with self._writing, self._telling():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with one_at_a_time(self.path.with_name(f".{self.path.name}.lock")):
                before = self._read() if self.path.exists() else self._turns  # another server may have written
                turns = dict(before)
                yield turns
                _check(turns, self.bases)
                if turns != before:
                    self._write(turns)
                self._seen, self._turns = _stamp(self.path), turns

    def _now(self) -> _Turns:
        """Return the pointers as they are in the file, which another server may have written since."""
        if (stamp := _stamp(self.path)) != self._seen and self._writing.acquire(blocking=False):
            try:
                self._turns = self._read() if stamp is not None else self._turns
            except ServingError as wrong:
                _log.error("%s; the names stay as they were", wrong)
            finally:
                self._seen = stamp
                self._writing.release()
        return self._turns

    def _read(self) -> _Turns:
        try:
            found = _FILE(parse_json(self.path.read_bytes()), "")
            if found["version"] != VERSION:
                raise Mistyped.at("version", f"{VERSION}, which this lorakit reads", found["version"])
            turns: _Turns = {name: past[:KEPT] for name, past in found["pointers"].items()}
            if empty := [name for name, past in turns.items() if not past]:
                raise Mistyped.at(f"pointers.{empty[0]}", "at least one target", ())
            _check(turns, self.bases)
        except FileNotFoundError:
            return {}
        except (JsonFault, Mistyped, ServingError) as wrong:
            raise ServingError(
                f"{self.path} cannot be used: {wrong}; repair it by hand, or move it away and point the names anew"
            ) from wrong
        except OSError as failed:
            raise ServingError(f"{self.path} could not be read: {failed.strerror or failed}") from failed
        return turns

    def _write(self, turns: _Turns) -> None:
        """Put the file in place of the old one in one step; drafts of killed writers go, for the lock is held."""
        past = {name: [{"at": t.at, "target": t.target} for t in turns[name]] for name in sorted(turns)}
        for left in self.path.parent.glob(f".{self.path.name}.new-*"):
            left.unlink()
        draft = self.path.with_name(f".{self.path.name}.new-{secrets.token_hex(4)}")
        try:
            with draft.open("w", encoding="utf-8") as file:
                file.write(json.dumps({"version": VERSION, "pointers": past}, indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, self.path)
        finally:
            draft.unlink(missing_ok=True)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as failed:
            raise ServingError(
                f"{self.path} could not be written: {failed.strerror or failed}; the names are as they were"
            ) from failed


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Return what changes when a file is replaced, or None without one."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def targets_of(target: Target) -> list[str]:
    """Return the digests or pointers of a target: one, or those of its arms."""
    return [target] if isinstance(target, str) else list(target)


def is_digest(word: str) -> bool:
    """Return whether a word is a whole digest."""
    return _DIGEST.fullmatch(word) is not None


def begins_digest(word: str) -> bool:
    """Return whether a word stands for a digest, whole or its first digits; then it is no name."""
    return _PART.fullmatch(word) is not None


def _drawn(alias: str, arms: Mapping[str, float], user: str | None, request: str | None) -> str:
    """Return the arm whose clock rings first for this user, or for this request where no user is known."""
    if not (user or request):
        raise RequestError(f"{alias} is shared out between {', '.join(arms)}; say the user, so that one can be drawn")
    who = f"user {user}" if user else f"request {request}"

    def rings(arm: str) -> float:
        raw = hashlib.sha256(f"{alias}\0{who}\0{arm}".encode("utf-8", "surrogatepass")).digest()
        return -math.log((int.from_bytes(raw[:8], "big") + 0.5) / 2**64) / arms[arm]

    return min(sorted(arms), key=rings)


def _turn(turns: _Turns, name: str, target: Target) -> None:
    past = turns.get(name, ())
    if not past or past[0].target != target:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        turns[name] = (Turn(target if isinstance(target, str) else dict(target), now), *past)[:KEPT]


def _past(turns: _Turns, name: str) -> tuple[Turn, ...]:
    if name not in turns:
        raise UnknownAdapterError(f"{shown(name)} is not a name or alias here{did_you_mean(name, turns)}")
    return turns[name]


def _check(turns: _Turns, bases: Sequence[str]) -> None:
    """Raise where a pointer or its present target cannot be."""
    for name, past in turns.items():
        _check_word(name, bases)
        _check_target(name, past[0].target, turns)
    for name in turns:
        _check_way(name, turns)


def _check_word(name: str, bases: Sequence[str]) -> None:
    parts = name.split("@")
    if len(parts) > 2 or len(name) > _LONGEST or ".." in name or not all(map(_WORD.fullmatch, parts)):
        raise RequestError(
            f"{shown(name)} is no name: use letters, digits and ._-/, at most {_LONGEST} in all, no '..', and begin "
            "with a letter or digit; name@alias for an alias"
        )
    if begins_digest(parts[-1]):
        raise RequestError(f"{name}: {parts[-1]} would be taken for a digest; choose another name")
    if name in bases:
        raise RequestError(f"{name} is the base itself; choose another name")


def _check_target(name: str, target: Target, turns: _Turns) -> None:
    if "@" not in name and not (isinstance(target, str) and _DIGEST.fullmatch(target)):
        raise RequestError(
            f"{name} is a name and points to a digest, not to {shown(target)}; make an alias, {name}@..."
        )
    if not targets_of(target):
        raise RequestError(f"{name} has no arms; give one at least")
    for arm in targets_of(target):
        if not _DIGEST.fullmatch(arm) and arm not in turns:
            raise UnknownAdapterError(
                f"{name}: target {shown(arm)} is no digest and no name here{did_you_mean(arm, turns)}"
            )
    for arm, weight in () if isinstance(target, str) else target.items():
        real = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (real and math.isfinite(weight) and weight > 0):
            raise RequestError(
                f"{name}: weight of {arm} is {shown(weight)}; give a number above 0, or leave the arm out"
            )


def _check_way(name: str, turns: _Turns) -> None:
    """Raise where a pointer leads back to itself, or where arms lead to arms."""
    ahead: list[tuple[str, tuple[str, ...], int]] = [(name, (), 0)]
    while ahead:
        here, way, shared = ahead.pop()
        if here in way:
            raise RequestError(f"{' -> '.join((*way, here))} goes in a circle; point one of them to a digest")
        if here not in turns:
            continue
        target = turns[here][0].target
        shared += not isinstance(target, str)
        if shared > 1:
            raise RequestError(f"{here} has arms and is itself an arm of {name}; name its arms there instead")
        ahead += [(arm, (*way, here), shared) for arm in targets_of(target)]


def _target(value: Any, key: str) -> Target:
    return text(value, key) if isinstance(value, str) else mapping(number)(value, key)


def _one_turn(value: Any, key: str) -> Turn:
    return Turn(**record({"at": text, "target": _target})(value, key))


_FILE = record({"version": whole, "pointers": mapping(several(_one_turn))})
