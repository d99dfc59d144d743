"""Answers and ratings meet by id, stay within bounds, and outlive a kill."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import RequestError, ServingError
from lorakit.serving.feedback import Answered, Feedback, _wilson

ONE = Answered("r-1", "support", "ab" * 32, None, None, "acme", 0.1, 0.5, 7, "stop")


@pytest.fixture
def feedback(tmp_path: Path) -> Iterator[Feedback]:
    made = Feedback(tmp_path / "feedback.db")
    yield made
    made.close()


def test_a_summary_tells_each_adapter_and_arm_apart(feedback: Feedback) -> None:
    for number in range(1, 101):
        feedback.answered(replace(ONE, id=f"a{number}", first=number / 1000, seconds=number / 100, arm="support@a"))
    feedback.answered(replace(ONE, id="late", first=None, seconds=99.0, arm="support@a", reason="deadline", tokens=0))
    feedback.answered(replace(ONE, id="bad", arm="support@a", reason="error", seconds=99.0, tokens=0))
    feedback.answered(replace(ONE, id="b1", arm="support@b", reason="cancelled"))
    feedback.answered(replace(ONE, id="base", name="llama", digest=None))
    base, a, b = feedback.summary()
    assert (base.name, base.digest, base.requests, base.seconds, base.first) == (
        "llama",
        None,
        1,
        (0.5, 0.5),
        (0.1, 0.1),
    )
    assert (a.arm, a.requests, a.errors, a.tokens) == ("support@a", 102, 1, 700)
    assert (a.seconds, a.first) == ((0.5, 0.95), (0.05, 0.095))
    assert (b.arm, b.requests, b.errors, b.seconds, b.first) == ("support@b", 1, 0, None, None)
    assert (b.ratings, b.rating, b.interval) == (0, None, None)


def test_ratings_are_a_mean_with_its_interval(feedback: Feedback) -> None:
    for number in range(10):
        feedback.answered(replace(ONE, id=f"r{number}"))
        feedback.rate(f"r{number}", 1 if number < 8 else -1, "fine")
    (row,) = feedback.summary()
    assert row.ratings == 10
    assert row.rating == pytest.approx(0.6)
    # Wilson's interval of 8 of 10 is 0.4902 to 0.9433 (as R's prop.test(8, 10, correct=FALSE) prints)
    assert row.interval == pytest.approx((2 * 0.4902 - 1, 2 * 0.9433 - 1), abs=2e-4)
    feedback.rate("r9", 1.0)
    assert feedback.summary()[0].rating == pytest.approx(0.8)
    assert feedback.summary()[0].ratings == 10


@given(ratings=st.lists(st.floats(-1, 1), min_size=1, max_size=30))
def test_the_interval_holds_the_mean_and_stays_in_range(ratings: list[float]) -> None:
    mean = sum(ratings) / len(ratings)
    low, high = _wilson(mean, len(ratings))
    assert -1 <= low <= mean + 1e-9
    assert mean - 1e-9 <= high <= 1
    assert high - low > 0.2  # thirty ratings do not settle it


def test_what_cannot_be_rated_is_refused(feedback: Feedback) -> None:
    feedback.answered(ONE)
    with pytest.raises(
        RequestError, match="no answer 'r-2' is known here; give the id of a response of the last 30 days"
    ):
        feedback.rate("r-2", 1)
    for rating in (5, -1.1, float("nan"), True, "1"):
        with pytest.raises(RequestError, match="rating: expected a number from -1 .bad. to 1 .good., found"):
            feedback.rate("r-1", rating)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="comment has 4,001 characters; at most 4,000 are kept"):
        feedback.rate("r-1", 1, "x" * 4001)
    with pytest.raises(RequestError, match="answer 'r-1' was written down before"):
        feedback.answered(ONE)
    with pytest.raises(
        RequestError, match="reason: expected one of stop, length, cancelled, deadline, error, found 'x'"
    ):
        feedback.answered(replace(ONE, id="x", reason="x"))  # type: ignore[arg-type]
    assert feedback.summary()[0].ratings == 0
    feedback.answered(replace(ONE, id="next"))
    assert feedback.summary()[0].requests == 2


def test_text_is_only_text(feedback: Feedback) -> None:
    evil = "'; DROP TABLE answers; --\0\n"
    feedback.answered(replace(ONE, id=evil, name=evil, tenant=evil))
    feedback.rate(evil, 1, evil)
    assert feedback.summary()[0].name == evil


def test_old_and_superfluous_answers_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feedback = Feedback(tmp_path / "feedback.db", days=2, rows=10)
    now = time.time()
    for number in range(25):
        monkeypatch.setattr(time, "time", lambda number=number: now + number)
        feedback.answered(replace(ONE, id=f"r{number}"))
        assert sum(row.requests for row in feedback.summary()) == min(number + 1, 10)
    feedback.rate("r24", 1)
    with pytest.raises(RequestError, match="no answer 'r14'"):
        feedback.rate("r14", 1)
    assert sum(row.requests for row in feedback.summary(now + 20)) == 5
    monkeypatch.setattr(time, "time", lambda: now + 2 * 86_400 + 20)
    feedback.answered(replace(ONE, id="new"))
    assert feedback.summary()[0].requests == 6
    feedback.close()
    monkeypatch.setattr(time, "time", lambda: now + 9 * 86_400)
    again = Feedback(tmp_path / "feedback.db", days=2, rows=10)
    assert again.summary() == []
    again.close()


def test_many_threads_and_another_process_may_write(feedback: Feedback) -> None:
    other = Feedback(feedback.path)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: (feedback, other)[n % 2].answered(replace(ONE, id=str(n))), range(200)))
        list(threads.map(lambda n: (other, feedback)[n % 2].rate(str(n), 1), range(200)))
    assert (feedback.summary()[0].requests, feedback.summary()[0].ratings) == (200, 200)
    other.close()


def test_what_was_told_before_a_kill_is_there(tmp_path: Path) -> None:
    code = f"""
from dataclasses import replace
from pathlib import Path
from lorakit.serving.feedback import Answered, Feedback
feedback = Feedback(Path({str(tmp_path / "feedback.db")!r}))
one = {ONE!r}
for number in range(10**6):
    feedback.answered(replace(one, id=str(number)))
    feedback.rate(str(number), 1)
    print(number, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        while int(writer.stdout.readline()) < 50:
            pass
        writer.kill()
        told = int((["50", *writer.stdout.read().splitlines()])[-1]) + 1
    feedback = Feedback(tmp_path / "feedback.db")
    (row,) = feedback.summary()
    assert row.requests in (told, told + 1)
    assert row.ratings in (told, told + 1)
    feedback.answered(replace(ONE, id="after"))
    feedback.close()


@pytest.mark.parametrize("change", ["text", "version", "folder"])
def test_a_file_of_another_kind_is_told(change: Any, tmp_path: Path) -> None:
    path = tmp_path / "feedback.db"
    if change == "text":
        path.write_text("not a database " * 100)
        message = "feedback.db: file is not a database; free its disk or make it writable, or move the file away to"
    elif change == "version":
        base = sqlite3.connect(path)
        base.execute("PRAGMA user_version = 9")
        base.close()
        message = "feedback.db has version 9, this lorakit reads 1; upgrade lorakit"
    else:
        path.mkdir()
        message = "feedback.db: unable to open database file"
    with pytest.raises(ServingError, match=message):
        Feedback(path)
