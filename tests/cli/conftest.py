"""One random base and one finished run on it, which the verbs read; no test changes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from lorakit.cli.app import app
from tests.training import samples


def invoke(*arguments: object) -> Result:
    """Run the command in this process; stdout and stderr apart."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


def answer(*arguments: object) -> dict[str, Any]:
    """Run a verb with --json and return its one object."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def write_recipe(folder: Path, base: Path, **train: Any) -> Path:
    """Write a recipe for six steps on 48 pairs, with 16 more held out."""
    values = {
        "model": str(base),
        "data": {
            "train": samples.write_rows(folder / "train.jsonl", samples.pairs(48)),
            "validation": samples.write_rows(folder / "valid.jsonl", samples.pairs(16, 48)),
            "max_length": 64,
        },
        "adapter": {"rank": 4, "alpha": 8},
        "train": {"lr": 5e-3, "batch_size": 8, "device": "cpu", **train},
        "output": str(folder / "run"),
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a byte tokenizer."""
    return samples.save_base(tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture(scope="session")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The folder of a finished run, and what `lorakit train` said."""
    folder = tmp_path_factory.mktemp("finished")
    result = invoke("train", write_recipe(folder, base))
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    return folder / "run", result


@pytest.fixture
def run(finished: tuple[Path, Result]) -> Path:
    """The folder of a finished run."""
    return finished[0]
