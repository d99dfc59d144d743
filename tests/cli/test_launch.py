"""Several processes behind one screen, with programs small enough to start in no time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lorakit.cli import launch as launching
from lorakit.cli.launch import launch


def test_each_process_is_told_its_place_and_the_first_has_the_screen(capfd: pytest.CaptureFixture[str]) -> None:
    program = (
        "import os, sys; e = os.environ; print(*(e[n] for n in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', "
        "'LOCAL_WORLD_SIZE', 'MASTER_ADDR')), *sys.argv[1:])"
    )
    assert launch(["train", "recipe.yaml"], 3, ["-c", program]) == 0
    assert capfd.readouterr().out == "0 0 3 3 127.0.0.1 train recipe.yaml\n"


def test_the_code_of_the_first_is_the_code_of_all(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch([], 2, ["-c", "import sys; sys.exit(2)"]) == 2
    assert capfd.readouterr().err == "", "the first has said why"


def test_a_fault_of_another_process_is_shown_with_its_last_words(capfd: pytest.CaptureFixture[str]) -> None:
    program = "import os, sys; os.environ['RANK'] == '1' and sys.exit('what happened')"
    assert launch([], 2, ["-c", program]) == 1
    assert capfd.readouterr().err == "process 1 ended with code 1; it said last:\nwhat happened\n"
    program = "import os, signal; os.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGKILL)"
    assert launch([], 2, ["-c", program]) == 1
    assert capfd.readouterr().err == "process 1 was ended by SIGKILL\n"


def test_who_does_not_notice_a_failure_is_ended(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launching, "GRACE", 0.2)
    program = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit(2); time.sleep(60)"
    began = time.monotonic()
    assert launch([], 2, ["-c", program]) == 1
    assert time.monotonic() - began < 20
    assert "process 1 ended with code 2" in capfd.readouterr().err


@pytest.mark.parametrize(("sent", "arrives"), [("SIGINT", "SIGINT"), ("SIGHUP", "SIGTERM")])
def test_a_wish_to_stop_reaches_every_process_once_and_all_may_take_their_time(
    tmp_path: Path, sent: str, arrives: str
) -> None:
    """Ctrl-C, or a terminal that is closed, which would leave the processes behind."""
    program = f"""
import os, pathlib, signal, sys, time
heard = []
signal.signal(signal.{arrives}, lambda *_: heard.append(1))
here = pathlib.Path({str(tmp_path)!r}) / os.environ["RANK"]
here.touch()
while not heard: time.sleep(0.02)
time.sleep(0.5)
here.write_text(str(len(heard)))
sys.exit(130)
"""
    heeded = f"import signal; signal.signal(signal.{sent}, signal.SIG_DFL)"  # a background shell ignores some
    command = (
        f"{heeded}; import sys; from lorakit.cli.launch import launch; sys.exit(launch([], 2, ['-c', {program!r}]))"
    )
    running = subprocess.Popen([sys.executable, "-c", command], start_new_session=True)
    while not all((tmp_path / place).exists() for place in "01"):
        time.sleep(0.05)
    threading.Timer(0.0, os.killpg, (running.pid, signal.Signals[sent])).start()  # as a terminal does it
    assert running.wait(timeout=60) == 130
    assert [(tmp_path / place).read_text() for place in "01"] == ["1", "1"]
