"""The command as a whole: exit codes, one-screen errors, one JSON object, quick help."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit import __version__
from lorakit.cli import app as room
from lorakit.cli.app import VERBS
from lorakit.errors import MissingExtraError
from tests.cli.conftest import invoke
from tests.slow import others_slow


def test_help_lists_the_verbs_in_the_order_of_use() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.split("Commands:\n")[1].splitlines()] == list(VERBS)
    assert list(VERBS)[:4] == ["quickstart", "plan", "train", "evaluate"]
    assert invoke().stdout == result.stdout  # nothing asked: the same answer


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_s_line_in_the_help_is_what_it_says_of_itself(verb: str) -> None:
    line = next(line for line in invoke("--help").stdout.splitlines() if line.startswith(f"  {verb} "))
    assert line.split(maxsplit=1)[1] == VERBS[verb]
    own = invoke(verb, "--help").stdout.partition("\n\n")[2].partition("\n\n")[0]
    assert " ".join(own.split()).startswith(VERBS[verb])


def test_help_imports_no_verb() -> None:
    code = (
        "import sys\nfrom lorakit.cli.app import app\ntry: app(['--help'])\n"
        "except SystemExit: print(*(n for n in sys.modules if n.startswith('lorakit.cli.')), file=sys.stderr)"
    )
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.split())
    assert loaded == {"lorakit.cli.app", "lorakit.cli.screen"}


def test_no_verb_s_line_in_the_help_is_cut_off() -> None:
    assert "..." not in invoke("--help").stdout.partition("Commands:")[2]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_and_answers_json(verb: str) -> None:
    result = invoke(verb, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout


def test_version_is_the_package_s() -> None:
    assert invoke("--version").stdout == f"lorakit {__version__}\n"


def test_the_command_line_imports_nothing_heavy() -> None:
    code = """import sys
from importlib import import_module
from lorakit.cli.app import VERBS
for verb in VERBS:
    import_module(f"lorakit.cli.{verb}")
print(*{name.split(".")[0] for name in sys.modules})"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "typer" in loaded
    assert not loaded & {"torch", "transformers", "pydantic", "rich", "datasets", "numpy", "yaml"}


def test_a_user_s_error_is_one_screen_without_a_traceback(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train: {lrr: 1e-3}\nmodle: x\n")
    result = invoke("train", recipe)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == (
        f"error: {recipe} has 2 problems:\n"
        "  - train.lrr: unknown key; did you mean 'lr'?\n"
        "  - modle: unknown key; did you mean 'model'?\n"
    )


def test_with_json_an_error_is_one_object_too(tmp_path: Path) -> None:
    result = invoke("train", tmp_path / "none.yaml", "--json")
    assert result.exit_code == 2
    message = f"cannot read the recipe {tmp_path / 'none.yaml'}: No such file or directory"
    assert json.loads(result.stdout) == {"error": {"kind": "RecipeError", "message": message}}
    assert result.stderr == f"error: {message}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument"),
        (["train", "x.yaml", "--outptu", "y"], "No such option: --outptu"),
        (["convert", "x", "--to", "ggml", "--output", "y"], "'ggml' is not one of 'peft', 'native'"),
    ],
)
def test_a_wrong_argument_exits_with_2_and_points_to_the_help(arguments: list[str], words: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert words in result.stderr
    assert result.stderr.endswith("--help lists what it takes\n")
    with_json = invoke(*arguments, "--json")
    assert json.loads(with_json.stdout)["error"]["kind"] == "UsageError"


def test_our_own_fault_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("lorakit.persist.load", broken)
    result = invoke("convert", "x", "--to", "peft", "--output", "y")
    assert isinstance(result.exception, ZeroDivisionError)
    assert result.exit_code == 1


def test_a_missing_package_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(*_: object, **__: object) -> None:
        raise MissingExtraError("this needs the package 'transformers'; run: pip install 'lorakit[train]'")

    monkeypatch.setattr("lorakit.training.base.need", absent)
    result = invoke("generate", tmp_path / "base", "--prompt", "a")
    assert result.exit_code == 2
    assert "pip install 'lorakit[train]'" in result.stderr


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lorakit.persist.load", stopped)
    result = invoke("convert", "x", "--to", "peft", "--output", "y")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "\ninterrupted\n")


@pytest.mark.parametrize("verb", [("generate", "x", "--prompt", "a"), ("quickstart",)])
def test_a_seed_beyond_what_generators_take_is_refused(verb: tuple[str, ...]) -> None:
    result = invoke(*verb, "--seed", 2**32)
    assert result.exit_code == 2
    assert "Invalid value for '--seed'" in result.stderr
    assert "4294967295" in result.stderr


def test_what_the_system_forbids_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/somewhere")

    monkeypatch.setattr("lorakit.persist.load", full)
    result = invoke("convert", "x", "--to", "peft", "--output", "y", "--json")
    message = "/tmp/somewhere: No space left on device"
    assert (result.exit_code, result.stderr) == (2, f"error: {message}\n")
    assert json.loads(result.stdout) == {"error": {"kind": "OSError", "message": message}}


@pytest.mark.parametrize(
    "arguments", others_slow(["methods", "methods --json", "train none --json"], ["methods --json"])
)
def test_a_pipe_that_closes_early_ends_it_quietly(arguments: str) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        command = [sys.executable, "-m", "lorakit", *arguments.split()]
        ended = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 141
    assert not re.search("Traceback|Exception", ended.stderr)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "arguments",
    others_slow(["--version", "methods", "methods --json", "train none --json"], ["--version", "methods --json"]),
)
def test_a_standard_output_that_takes_nothing_is_one_line(arguments: str) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "lorakit", *arguments.split()]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == "error: standard output: No space left on device"
    assert "Traceback" not in done.stderr


def test_a_standard_output_that_is_closed_takes_nothing_and_harms_nothing() -> None:
    done = subprocess.run(f"{sys.executable} -m lorakit methods >&-", shell=True, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("where", ["lorakit.cli.app", "typer", "atexit"])
def test_ctrl_c_before_and_after_the_verb_is_one_line_too(where: str, tmp_path: Path) -> None:
    pressed = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    code = f"""
import atexit, builtins, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a parent in the background leaves ignored
sys.argv = ["lorakit", "--version"]
real = builtins.__import__
def trap(name, *rest):
    if name == {where!r}:
        {pressed}
    return real(name, *rest)
if {where!r} == "atexit":
    atexit.register(exec, {pressed!r})
builtins.__import__ = trap
from lorakit.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "\ninterrupted\n")


def test_the_installed_command_keeps_json_pure_and_plain(run: Path) -> None:
    command = [sys.executable, "-m", "lorakit", "evaluate", str(run), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout)["after"]["perplexity"] > 1
    assert "\x1b" not in done.stdout + done.stderr
    assert "arning" not in done.stderr


def test_every_verb_has_its_own_file() -> None:
    folder = Path(room.__file__).parent
    assert all((folder / f"{verb}.py").is_file() for verb in VERBS)
