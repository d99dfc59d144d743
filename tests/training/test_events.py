"""The event log: whole lines, plain numbers, and a reader that survives a crash."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.training.events import EventLog, peak_memory_bytes, read_events
from lorakit.training.flow import evaluations_since_best
from lorakit.training.progress import Progress


def test_a_line_is_one_event_and_the_listener_gets_what_a_reader_gets(tmp_path: Path) -> None:
    heard = []
    (tmp_path / "run").mkdir()
    log = EventLog(tmp_path / "run" / "events.jsonl", heard.append)
    log.append("start", model="x", labels=("a", "b"))
    log.append("step", 3, loss=0.5)
    assert read_events(tmp_path / "run" / "events.jsonl") == heard
    assert [(e["event"], e["step"]) for e in heard] == [("start", 0), ("step", 3)]
    assert heard[0]["labels"] == ["a", "b"]
    assert heard[1]["time"] >= heard[0]["time"] > 1e9


def test_a_last_line_cut_by_a_crash_is_left_out(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.append("start")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "st')
    assert [event["event"] for event in read_events(tmp_path / "events.jsonl")] == ["start"]


def test_a_number_that_json_has_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        EventLog(tmp_path / "events.jsonl").append("step", loss=float("nan"))


def test_memory_is_told_in_bytes() -> None:
    assert 50e6 < peak_memory_bytes() < 1e12


def test_totals_go_on_after_a_resume() -> None:
    first = Progress()
    first.count(100, 40)
    first.count(50, 20)
    second = Progress()
    second.go_on(first.to_json())
    second.count(10, 5)
    assert (second.tokens, second.trained_tokens, second.tokens_of_step) == (160, 65, 10)
    assert second.seconds >= first.to_json()["seconds"]


@pytest.mark.parametrize(
    ("losses", "since"), [([], 0), ([3.0], 0), ([3.0, 2.0], 0), ([2.0, 3.0, 3.0], 2), ([2.0, 2.0], 1), ([2, 1, 3], 1)]
)
def test_patience_counts_evaluations_since_the_best(losses: list[float], since: int) -> None:
    told = [{"eval_loss": loss, "step": step} for step, loss in enumerate(losses, 1)]
    history = [{"loss": 9.0, "step": 1}, *told, {"train_loss": 1.0, "step": 6}]
    assert evaluations_since_best(history) == since
