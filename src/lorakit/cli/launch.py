"""Several processes of one command on this machine, with one screen: the first one's.

torchrun starts processes too, and ends them half a minute after a Ctrl-C, whether they have saved or not. Here a signal
is handed on once, and they take the time they need.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GRACE = 15.0
"""Seconds the others get to notice that one has failed, and to say so, before they are ended."""
ENDINGS = (0, 2, 130)
"""Exit codes after which a process has said what there was to say."""


SIGNALS = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM}
"""What is handed on, and as what: a terminal that is closed is a wish to stop, and to save."""
HANGUP = getattr(signal, "SIGHUP", None)
if HANGUP is not None:
    SIGNALS[HANGUP] = signal.SIGTERM


def launch(words: Sequence[str], count: int, program: Sequence[str] = ("-m", "lorakit")) -> int:
    """Run `lorakit` (or another program of this Python) with these words in `count` processes.

    Returns the exit code of the first. The others are silent; what one of them said last is shown where it failed in a
    way that the first could not tell.
    """
    with tempfile.TemporaryDirectory(prefix="lorakit-") as folder:
        said = [Path(folder) / str(place) for place in range(count)]
        port = _free_port()
        running = [_start([*program, *words], count, place, port, said[place]) for place in range(count)]
        before = {number: signal.getsignal(number) for number in SIGNALS}
        if HANGUP in before and before[HANGUP] == signal.SIG_IGN:  # as nohup asks for
            del before[HANGUP]

        def hand_on(number: int, frame: Any) -> None:
            for one in running:
                if one.poll() is None:
                    one.send_signal(SIGNALS[number])  # type: ignore[index]

        for number in before:
            signal.signal(number, hand_on)
        try:
            failed, ended = _await(running)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        codes = [one.returncode for one in running]
        for place, code in enumerate(codes):
            unheard = place == failed and 0 in ended
            abrupt = code < 0 or (code not in ENDINGS and code != codes[0])
            if unheard or (abrupt and place not in ended):
                _show(place, code, said[place])
        return codes[0] if codes[0] > 0 or failed is None else 1


def _free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


def _start(words: Sequence[str], count: int, place: int, port: int, said: Path) -> subprocess.Popen[bytes]:
    """Start one process in a session of its own, so that Ctrl-C reaches it once, through `launch`."""
    told = {
        "RANK": place, "LOCAL_RANK": place, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LORAKIT_LAUNCHER": os.getpid(),
    }  # fmt: skip
    mine = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    if sys.platform == "linux":
        mine["GLOO_SOCKET_IFNAME"] = "lo"  # a host's own name need not lead back to it
    env = {**mine, **os.environ, **{name: str(value) for name, value in told.items()}}
    command = [sys.executable, *words]
    if place == 0:
        return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
    with said.open("wb") as words_of_it:
        return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                stderr=words_of_it, start_new_session=True)  # fmt: skip


def _await(running: Sequence[subprocess.Popen[bytes]]) -> tuple[int | None, set[int]]:
    """Wait for all; return the first that failed, and those that had to be ended because they did not notice."""
    failed: int | None = None
    since, ended = 0.0, set[int]()
    while None in (codes := [one.poll() for one in running]):
        if failed is None and any(codes):
            failed, since = next(place for place, code in enumerate(codes) if code), time.monotonic()
        if failed is not None and not ended and time.monotonic() - since > GRACE:
            ended = {place for place, code in enumerate(codes) if code is None}
            for place in ended:
                running[place].kill()
        time.sleep(0.05)
    return next((place for place, code in enumerate(codes) if code), None) if failed is None else failed, ended


def _show(place: int, code: int, said: Path) -> None:
    """Print the last words of a process that is not on the screen."""
    last = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-20:] if said.exists() else []
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    print(f"process {place} {how}" + ("; it said last:" if last else ""), *last, sep="\n", file=sys.stderr)
