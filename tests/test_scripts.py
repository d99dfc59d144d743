"""scripts/setup installs once, again when something changed, and says what to do when it cannot.

A stub stands in for the virtual environment's Python and writes down what pip was asked to do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[1] / "scripts" / "setup"
STUB = f"""#!/usr/bin/env bash
case "$*" in
    "-m pip install"*) echo "$*" >> asked; echo "ERROR: no space left"; exit "${{PIP_EXIT:-0}}" ;;
    "-m pip --version" | "-c "*) exit 0 ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the setup script, the two files it reads, and a stubbed .venv."""
    for name, text in {"pyproject.toml": "a", "constraints.txt": "b", ".venv/bin/python": STUB}.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / ".venv/bin/python").chmod(0o755)
    (tmp_path / "scripts").mkdir()
    shutil.copy(SETUP, tmp_path / "scripts" / "setup")
    return tmp_path


def setup(clone: Path, *extras: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [clone / "scripts" / "setup", *extras],
        cwd="/",
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def asked(clone: Path) -> list[str]:
    """The last words of each pip install: what it was to install."""
    log = clone / "asked"
    return [line.split()[-1] for line in log.read_text().splitlines()] if log.exists() else []


def test_setup_installs_once_and_through_the_constraints(clone: Path) -> None:
    first, second = setup(clone, "train", "dev"), setup(clone, "dev", "train")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert asked(clone) == [".[dev,train]"]
    assert "-c constraints.txt -e" in (clone / "asked").read_text()
    assert second.stdout == second.stderr == ""


def test_setup_skips_what_an_earlier_call_installed_and_only_adds(clone: Path) -> None:
    for extras in (["train"], ["dev", "train"], ["train"], ["dev"], []):
        assert setup(clone, *extras).returncode == 0
    assert asked(clone) == [".[train]", ".[dev,train]"]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_setup_installs_again_when_its_inputs_change(clone: Path, name: str) -> None:
    setup(clone, "dev", "train")
    (clone / name).write_text("changed")
    setup(clone, "train")
    setup(clone, "train")
    assert asked(clone) == [".[dev,train]", ".[dev,train]"]


def test_a_failed_install_shows_pips_last_words_and_is_tried_again(clone: Path) -> None:
    failed = setup(clone, "train", PIP_EXIT="1")
    assert failed.returncode == 1
    assert "ERROR: no space left" in failed.stderr
    assert "setup: pip failed; its last lines are above, all of them in .venv/setup.log" in failed.stderr
    assert setup(clone, "train").returncode == 0
    assert asked(clone) == [".[train]", ".[train]"]


def test_setup_without_a_fitting_python_says_how_to_get_one(clone: Path) -> None:
    shutil.rmtree(clone / ".venv")
    for name in ("python", "python3", *(f"python3.{minor}" for minor in range(10, 14))):
        (clone / name).write_text("#!/bin/sh\nexit 1\n")
        (clone / name).chmod(0o755)
    path = f"{clone}{os.pathsep}{os.environ['PATH']}"
    none = setup(clone, "train", PATH=path, PYTHON="")
    assert none.returncode == 1
    assert "no Python >= 3.10 with the venv module was found" in none.stderr
    assert "apt install python3 python3-venv" in none.stderr
    wrong = setup(clone, "train", PATH=path, PYTHON="/no/such/python")
    assert wrong.returncode == 1
    assert "PYTHON=/no/such/python is not a Python >= 3.10 with the venv module" in wrong.stderr
    assert not (clone / ".venv").exists()
