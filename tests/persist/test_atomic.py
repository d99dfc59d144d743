"""A save is whole or absent: under a full disk at every step, and under kill -9 at any moment."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import AdapterFileError
from lorakit.persist import atomic, load, save
from lorakit.persist.atomic import atomic_directory, write_file
from tests.persist.samples import adapter, same
from tests.slow import others_slow

STEPS = ("write", "fsync", "rename", "open", "mkdir", "link")


class FailsAt:
    """The n-th call of an operating-system function fails with ENOSPC; the others go through."""

    def __init__(self, step: str, n: int) -> None:
        self.real: Callable[..., Any] = getattr(os, step)
        self.left, self.failed = n, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Count down, fail once."""
        self.left -= 1
        if self.left == -1:
            self.failed = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.real(*args, **kwargs)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("two_steps", [False, True], ids=["exchange", "two renames"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("format", ["peft", "native"])
def test_a_full_disk_at_any_step_leaves_the_old_adapter(
    format: Any, step: str, two_steps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "adapter"
    if two_steps:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    save(adapter(1.0), place, format)
    (place / "notes.txt").write_text("mine")
    before = contents(place)
    for n in range(60):
        fails = FailsAt(step, n)
        with monkeypatch.context() as patch:
            patch.setattr(os, step, fails)
            problem = None
            try:
                save(adapter(2.0), place, format)
            except AdapterFileError as caught:
                problem = str(caught)
        if not fails.failed:
            break
        if problem is not None:
            assert "No space left on device" in problem
            assert str(place) in problem
            assert contents(place) == before, f"call {n} of {step}"
        else:  # what failed was tidying up, before or after: a leftover may lie there, the new adapter is whole
            assert same(load(place), adapter(2.0))
            save(adapter(1.0), place, format)
    else:
        pytest.fail(f"{step} never came through")
    assert n > 0 or step in ("rename", "mkdir")
    assert same(load(place), adapter(2.0))
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_full_disk_says_what_was_written_and_how_much_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(adapter(1.0), tmp_path / "a")
    monkeypatch.setattr(os, "write", FailsAt("write", 1))
    with pytest.raises(AdapterFileError) as caught:
        save(adapter(2.0), tmp_path / "a")
    text = str(caught.value)
    assert "could not write adapter_model.safetensors: No space left on device (it needs " in text
    assert "bytes" in text
    assert text.endswith("what was there before is untouched")


def test_a_failing_exchange_leaves_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(adapter(1.0), tmp_path / "a")

    def refused(*_: Path) -> bool:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(atomic, "_exchange", refused)
    with pytest.raises(AdapterFileError, match="Permission denied; what was there before is untouched"):
        save(adapter(2.0), tmp_path / "a")
    assert same(load(tmp_path / "a"), adapter(1.0))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


CRASHES = """
import os, random, signal, sys, time
from pathlib import Path
from lorakit.persist import atomic, load, save
from tests.persist.samples import adapter
place, format, two_steps = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "two"
if two_steps:
    atomic._exchange = lambda *_: False
random.seed(0)
states = {value: adapter(value) for value in (1.0, 2.0)}
save(states[1.0], place, format)
(place / "notes.txt").write_text("mine")
start, seen, cut = time.monotonic(), set(), 0
def enough():
    spent = time.monotonic() - start
    return len(seen) == 2 and cut >= 10 and (cut >= 40 or spent > 4)
def saves_of(child):  # how often it has come through so far
    return counted.stat().st_size if counted.exists() else 0
counted = place.parent.parent / "counted"
while not enough():
    counted.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        while True:
            for state in states.values():
                save(state, place, format)
                with counted.open("a") as file:
                    file.write(".")
    wanted = random.choice((0, 1, 2))
    while saves_of(child) < wanted:  # a busy machine takes as long as it takes
        time.sleep(0.001)
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the writer gave up"
    time.sleep(random.uniform(0.0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = load(place)
    values = {float(v) for u in found.updates for t in u.tensors.values() for v in t.flatten()}
    values |= {float(v) for v in found.trained["score.weight"].flatten()}
    assert len(values) == 1, values
    assert (atomic.resting(place) / "notes.txt").read_text() == "mine"
    seen |= values
    cut += 1
save(states[1.0], place, format)
left = [p.name for p in place.parent.iterdir()]
assert left == [place.name], left
print(cut, sorted(seen))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("format", "steps"), others_slow([("peft", "one"), ("native", "one"), ("peft", "two")], [("peft", "two")])
)
def test_kill_9_at_any_moment_leaves_the_old_adapter_or_the_new(format: str, steps: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CRASHES, str(tmp_path / "place" / "adapter"), format, steps],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    cut, seen = done.stdout.split(" ", 1)
    assert int(cut) >= 10
    assert seen.strip() == "[1.0, 2.0]"


def test_a_replacement_cut_between_its_two_renames_still_loads_and_heals(tmp_path: Path) -> None:
    save(adapter(1.0), tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / f".a{atomic.OLD}12345678")
    assert same(load(tmp_path / "a"), adapter(1.0))
    save(adapter(2.0), tmp_path / "a")
    assert same(load(tmp_path / "a"), adapter(2.0))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_draft_of_a_living_writer_is_left_to_it(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "a") as first:
        write_file(first / "x", "1")
        with atomic_directory(tmp_path / "a") as second:
            write_file(second / "x", "2")
        assert first.exists()
    assert (tmp_path / "a" / "x").read_text() == "1"


def test_other_files_stay_unless_clean_and_cost_no_copy(tmp_path: Path) -> None:
    place = tmp_path / "a"
    (place / "logs" / "deep").mkdir(parents=True)
    (place / "logs" / "deep" / "x").write_text("x")
    (place / "link").symlink_to("logs")
    (place / "old").write_text("old")
    inode = (place / "logs" / "deep" / "x").stat().st_ino
    with atomic_directory(place, drop=frozenset({"old"})) as draft:
        write_file(draft / "new", b"")
    assert sorted(p.name for p in place.iterdir()) == ["link", "logs", "new"]
    assert (place / "link").readlink() == Path("logs")
    assert (place / "logs" / "deep" / "x").stat().st_ino == inode
    with atomic_directory(place, clean=True) as draft:
        write_file(draft / "only", "1")
    assert [p.name for p in place.iterdir()] == ["only"]


def test_a_failing_body_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "a") as draft:
        write_file(draft / "x", "1")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_a_directory_is_saved_through(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "alias").symlink_to("real")
    save(adapter(1.0), tmp_path / "alias")
    assert (tmp_path / "alias").is_symlink()
    assert same(load(tmp_path / "real"), adapter(1.0))


def test_saving_over_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(AdapterFileError, match="a is a file; give a directory to save into"):
        save(adapter(), tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine"
