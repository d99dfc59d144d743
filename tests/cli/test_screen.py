"""Where words go, and how numbers are written."""

from __future__ import annotations

import json
import sys

import pytest

from lorakit.cli.screen import duration, print_error, print_json, printable, screen, size, table


def test_under_json_only_the_object_reaches_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    with screen(True) as out:
        sys.stdout.write("a library's chatter\n")
        out.say("a result")
        out.note("a step")
        out.show(table("title", "a", "b", rows=[("1", "2")]))
        out.result({"loss": float("inf"), "name": "é"})
    said = capfd.readouterr()
    assert said.out == '{"loss": null, "name": "é"}\n'
    assert all(words in said.err for words in ("a library's chatter", "a result", "a step", "title"))


def test_a_verb_that_fails_prints_no_result(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no"), screen(True) as out:
        out.result({"a": 1})
        raise ValueError("no")
    assert capfd.readouterr().out == ""


def test_results_go_to_standard_output_and_progress_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    with screen(False) as out:
        out.say("one", "two")
        out.note("three")
    assert capfd.readouterr() == ("one\ntwo\n", "three\n")


def test_an_error_keeps_its_brackets_and_its_lines(capfd: pytest.CaptureFixture[str]) -> None:
    message = "[bold]not markup[/bold] " + "x" * 200 + "\n  - second"
    print_error("DataError", message, as_json=True)
    said = capfd.readouterr()
    assert said.err == f"error: {message}\n"
    assert json.loads(said.out) == {"error": {"kind": "DataError", "message": message}}


def test_not_a_number_is_null(capfd: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [float("nan"), 1.5], "b": {"c": float("-inf")}})
    assert json.loads(capfd.readouterr().out) == {"a": [None, 1.5], "b": {"c": None}}


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (11_551_040, "11.6 MB"), (2.5e12, "2.5 TB")]
)
def test_sizes_are_in_thousands(count: int, words: str) -> None:
    assert size(count) == words


def test_a_model_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\r\x07\n\tñ") == "a\ufffd[2Jb\ufffd\ufffd\n\tñ"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (0.4, "0.4 s"), (59.4, "59 s"), (59.6, "1:00"), (3723, "1:02:03")]
)
def test_durations_read_like_a_clock(seconds: float, words: str) -> None:
    assert duration(seconds) == words
