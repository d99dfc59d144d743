"""Every error a user can cause, as one tree.

    LorakitError
    ├── SpecError          an adapter specification that cannot mean anything (rank 0, unknown method)
    │   └── TargetError    a pattern that matched nothing, or matched what cannot be adapted
    ├── AttachError        a model that cannot take the adapter (patched forward, name in use)
    ├── AliveError         an adapter that is attached but was never called, or got no gradient
    ├── MergeError         a merge that would lie: tied weight, input-dependent update, NaN
    ├── CombineError       adapters that cannot become one: other bases, no change of a weight, NaN
    ├── AdapterFileError   a file that is missing, corrupt, of another base, or could not be written
    ├── RecipeError        a recipe with an unknown key, a wrong type, or a changed resume
    ├── DataError          rows that cannot be read, recognised or trained on
    ├── DeviceError        a device that was asked for and is not there
    ├── ServingError       a server that cannot do what it was asked for
    │   ├── RequestError         a request that cannot be answered: an empty or over-long prompt, a wrong value
    │   ├── UnknownAdapterError  a model or adapter that is not served here, which the base never answers for
    │   ├── AccessError          a key that is missing, unknown, or not allowed to do this
    │   └── BusyError            more requests than may wait
    └── MissingExtraError  a feature whose optional packages are not installed

A message says what is wrong, where, what was expected and what to do, on one screen. The command line prints it
and exits with 2; everything that is not a `LorakitError` is our bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

_MANY = 2000  # words that are compared at once; five times as many take a quarter of a second
_LONGEST = 60  # characters of a value that is shown


class LorakitError(Exception):
    """Root of the errors a user can cause and repair."""


class SpecError(LorakitError, ValueError):
    """An adapter specification that cannot mean anything."""


class TargetError(SpecError):
    """A target pattern that matched nothing, or a match that cannot be adapted."""


class AttachError(LorakitError):
    """A model that cannot take the adapter."""


class AliveError(LorakitError):
    """An attached adapter that a forward never called or a backward never reached."""


class MergeError(LorakitError):
    """A merge that would change more, less or something other than the adapted forward."""


class CombineError(LorakitError, ValueError):
    """Adapters that cannot become one, or not as it was asked for."""


class AdapterFileError(LorakitError):
    """An adapter file that is missing, corrupt, made for another base, or could not be written."""


class RecipeError(LorakitError, ValueError):
    """A recipe with an unknown key, a wrong value, or a change a resumed run does not allow."""


class DataError(LorakitError, ValueError):
    """Rows that cannot be read, recognised or trained on."""


class DeviceError(LorakitError):
    """A device that was asked for and is not there."""


class ServingError(LorakitError):
    """A server that cannot do what it was asked for."""


class RequestError(ServingError, ValueError):
    """A request that cannot be answered as it is; `param` is the parameter at fault, `code` the fault in a word."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param, self.code = param, code


class UnknownAdapterError(ServingError, LookupError):
    """A model or adapter that is not served here; the base never answers in its place."""


class AccessError(ServingError):
    """A key that is missing, unknown, or not allowed to do this."""


class BusyError(ServingError):
    """More requests than may wait; `retry_after` says in how many seconds a place may be free."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class MissingExtraError(LorakitError, ImportError):
    """A feature whose optional packages are not installed."""


def did_you_mean(word: str, known: Iterable[str], limit: int = 3) -> str:
    """Return `; did you mean 'a', 'b'?` for the nearest known words, or an empty string when none is near.

    Among very many only those of the same first letter and about the same length are looked at.
    """
    words = sorted(set(known))
    if len(words) > _MANY:
        alike = (one for one in words if one[:1] == word[:1] and abs(len(one) - len(word)) <= 2)
        words = list(itertools.islice(alike, _MANY))
    near = difflib.get_close_matches(word, words, n=limit, cutoff=0.6)
    return f"; did you mean {', '.join(map(repr, near))}?" if near else ""


def looked_in(path: Path) -> str:
    """Return `; looked for /where/it/would/be` for a relative path: it counts from the current directory."""
    return "" if path.is_absolute() else f"; looked for {Path.cwd() / path}"


def shown(value: object) -> str:
    """Return a value as an error shows it: in one line of readable length."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**_LONGEST:
        return f"an integer of about {int(value.bit_length() * 0.30103):,} digits"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."


def grouped(problems: Sequence[str], fewest: int = 4) -> list[str]:
    """Join problems `place: what` that are the same at `fewest` places or more into one, `what: place, place ...`."""
    places: dict[str, list[str]] = {}
    for problem in problems:
        place, _, what = problem.partition(": ")
        places.setdefault(what or problem, []).append(place)
    joined = []
    for what, found in places.items():
        if len(found) < fewest:
            joined += [place if place == what else f"{place}: {what}" for place in found]
        else:
            joined.append(f"{what}: {', '.join(found[:2])} and {len(found) - 2} more")
    return joined


def few(names: Sequence[str], most: int = 4) -> str:
    """Return the first names with commas between, and how many more there are: `a, b, c, d and 3 more`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def listing(lines: Sequence[str], limit: int = 12) -> str:
    """Join offenders one a line, indented, and count those beyond one screen."""
    shown = [f"  - {line}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"  ... and {len(lines) - limit} more")
    return "\n".join(shown)
