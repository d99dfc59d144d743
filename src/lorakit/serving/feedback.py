"""How each adapter does with the people it answers: counts, waits and ratings, in one SQLite file.

An answer is written down when it ends and rated, perhaps, much later; the two meet by the answer's id. Prompts and
answers themselves are not kept. The file outlives a kill at any moment: what was told is in it, and nothing by halves.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from lorakit.errors import RequestError, ServingError, shown
from lorakit.serving.percentiles import percentiles
from lorakit.serving.requests import Reason

VERSION = 1
MOST_COMMENT = 4000
"""Characters of a comment."""
_Z = 1.959964  # two-sided 95 %
_WAIT = 10.0  # seconds for another process to finish writing
_SCHEMA = """
CREATE TABLE answers (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    at REAL NOT NULL,
    name TEXT NOT NULL,
    digest TEXT,
    arm TEXT,
    alias TEXT,
    tenant TEXT NOT NULL,
    first REAL,
    seconds REAL NOT NULL,
    tokens INTEGER NOT NULL,
    reason TEXT NOT NULL,
    rating REAL,
    comment TEXT
);
CREATE INDEX answers_at ON answers (at);
"""


@dataclass(frozen=True)
class Answered:
    """One answer, as it ended.

    Args:
        id: the response's, by which it is rated.
        name: as it was asked for.
        digest: the adapter, None for the base.
        arm: which was drawn, where the name is shared out.
        alias: under which it was asked, where it was one.
        tenant: who asked.
        first: seconds to the first token; None where none came.
        seconds: in all.
        tokens: of the answer.
        reason: how it ended.
    """

    id: str
    name: str
    digest: str | None
    arm: str | None
    alias: str | None
    tenant: str
    first: float | None
    seconds: float
    tokens: int
    reason: Reason


@dataclass(frozen=True)
class Row:
    """What an adapter did under one name, or as one arm of it.

    Args:
        name, digest, arm: whom it is about.
        requests: all of them.
        errors: those that ended in `error`.
        tokens: of all answers.
        seconds: median and 95th percentile of answers that came to their end (`stop` or `length`), None without any.
        first: the same of the time to the first token.
        ratings: how many answers were rated.
        rating: their mean, from -1 to 1; None without any.
        interval: of that mean, 95 %.
    """

    name: str
    digest: str | None
    arm: str | None
    requests: int
    errors: int
    tokens: int
    seconds: tuple[float, float] | None
    first: tuple[float, float] | None
    ratings: int
    rating: float | None
    interval: tuple[float, float] | None


class Feedback:
    """The answers of the last `days`, `rows` of them at most, and how people liked them; safe on any thread.

    Raises:
        ServingError: a file that is no such database, or cannot be written.
    """

    def __init__(self, path: Path, *, days: float = 30.0, rows: int = 100_000) -> None:
        self.path, self.days, self.rows = Path(path), days, rows
        self._lock = threading.Lock()
        with self._telling():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(self.path, timeout=_WAIT, isolation_level=None, check_same_thread=False)
            try:
                self._open()
            except BaseException:
                self._base.close()
                raise

    def answered(self, answer: Answered) -> None:
        """Write an answer down, and forget those that are too old or too many.

        Raises:
            RequestError: an id that was written down before.
            ServingError: a file that cannot be written.
        """
        if answer.reason not in get_args(Reason):
            raise RequestError(f"reason: expected one of {', '.join(get_args(Reason))}, found {shown(answer.reason)}")
        now = time.time()
        values = (answer.id, now, answer.name, answer.digest, answer.arm, answer.alias, answer.tenant, answer.first,
                  answer.seconds, answer.tokens, answer.reason)  # fmt: skip
        with self._lock, self._telling(), self._one_step():
            try:
                self._base.execute(
                    "INSERT INTO answers (id, at, name, digest, arm, alias, tenant, first, seconds, tokens, reason) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    values,
                )
            except sqlite3.IntegrityError:
                raise RequestError(f"answer {shown(answer.id)} was written down before; ids are given once") from None
            self._prune(now)

    def rate(self, response_id: str, rating: float, comment: str | None = None) -> None:
        """Rate an answer from -1 (bad) to 1 (good), thumbs being the ends and n stars of 5 being (n - 3) / 2.

        A second rating of the same answer replaces the first.

        Raises:
            RequestError: an answer that is not known here, or no longer; a rating outside; a comment too long.
            ServingError: a file that cannot be written.
        """
        if isinstance(rating, bool) or not isinstance(rating, int | float) or not -1.0 <= rating <= 1.0:
            raise RequestError(f"rating: expected a number from -1 (bad) to 1 (good), found {shown(rating)}")
        if comment is not None and len(comment) > MOST_COMMENT:
            raise RequestError(f"comment has {len(comment):,} characters; at most {MOST_COMMENT:,} are kept")
        with self._lock, self._telling():
            found = self._base.execute(
                "UPDATE answers SET rating = ?, comment = ? WHERE id = ?", (float(rating), comment, response_id)
            )
            if found.rowcount == 0:
                raise RequestError(
                    f"no answer {shown(response_id)} is known here; give the id of a response of the last "
                    f"{self.days:g} days"
                )

    def summary(self, since: float = 0.0) -> list[Row]:
        """Return a row for each adapter and arm that answered after `since` (seconds since 1970), by name.

        Raises:
            ServingError: a file that cannot be read.
        """
        with self._lock, self._telling():
            found = self._base.execute(
                "SELECT name, digest, arm, first, seconds, tokens, reason, rating FROM answers WHERE at >= ?", (since,)
            ).fetchall()
        groups: dict[tuple[str, str | None, str | None], list[tuple[float | None, float, int, str, float | None]]] = {}
        for name, digest, arm, *rest in found:
            groups.setdefault((name, digest, arm), []).append((rest[0], rest[1], rest[2], rest[3], rest[4]))
        keys = sorted(groups, key=lambda key: tuple(part or "" for part in key))
        return [_row(key, groups[key]) for key in keys]

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._base.close()

    def _open(self) -> None:
        # WAL lets others read meanwhile; NORMAL outlives a kill of the process, and a power cut but for the last few.
        self._base.execute("PRAGMA journal_mode = WAL")
        self._base.execute("PRAGMA synchronous = NORMAL")
        with self._one_step():  # two processes may open a new file at once
            version = self._base.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in _SCHEMA.split(";"):
                    self._base.execute(statement)
                self._base.execute(f"PRAGMA user_version = {VERSION}")
            elif version != VERSION:
                raise ServingError(f"{self.path} has version {version}, this lorakit reads {VERSION}; upgrade lorakit")
            self._prune(time.time())

    def _prune(self, now: float) -> None:
        self._base.execute("DELETE FROM answers WHERE at < ?", (now - self.days * 86_400,))
        self._base.execute("DELETE FROM answers WHERE number <= (SELECT max(number) FROM answers) - ?", (self.rows,))

    @contextmanager
    def _one_step(self) -> Iterator[None]:
        self._base.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._base.execute("ROLLBACK")
            raise
        self._base.execute("COMMIT")

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as failed:
            what = getattr(failed, "strerror", None) or failed
            raise ServingError(
                f"{self.path}: {what}; free its disk or make it writable, or move the file away to begin anew"
            ) from failed


def _row(
    key: tuple[str, str | None, str | None], answers: Sequence[tuple[float | None, float, int, str, float | None]]
) -> Row:
    whole = [answer for answer in answers if answer[3] in ("stop", "length")]
    ratings = [rating for *_, rating in answers if rating is not None]
    mean = sum(ratings) / len(ratings) if ratings else None
    return Row(
        *key,
        requests=len(answers),
        errors=sum(reason == "error" for _, _, _, reason, _ in answers),
        tokens=sum(tokens for _, _, tokens, _, _ in answers),
        seconds=percentiles([seconds for _, seconds, *_ in whole]),
        first=percentiles([first for first, *_ in whole if first is not None]),
        ratings=len(ratings),
        rating=mean,
        interval=None if mean is None else _wilson(mean, len(ratings)),
    )


def _wilson(mean: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a mean in [-1, 1].

    (E. B. Wilson, 1927.) It is meant for two outcomes, as thumbs are, and is too wide, never too narrow, for ratings in
    between: no others of the same mean spread as far. Two ratings that agree leave it wide, unlike mean +- 2 errors.
    """
    share, z2 = (mean + 1) / 2, _Z**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count) * (share * (1 - share) / count + z2 / (4 * count**2)) ** 0.5
    return 2 * max(0.0, middle - half) - 1, 2 * min(1.0, middle + half) - 1
