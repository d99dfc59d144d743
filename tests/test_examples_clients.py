"""The examples of clients: OpenAI's own packages, for Python and for Node, against a server that listens."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.web import Server, listening, server

CLIENTS = Path(__file__).parents[1] / "examples" / "clients"
pytest.importorskip("fastapi", reason="needs lorakit[serve]")


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Server]:
    with server(tmp_path, {"first": 1.5}) as running:
        yield running


def rated(made: Server) -> bool:
    assert made.service.feedback is not None
    return [(row.name, row.ratings) for row in made.service.feedback.summary()] == [("first", 1)]


def test_the_python_client_streams_and_rates(made: Server, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai", reason="needs the package openai")
    from examples.clients.openai_python import ask

    with listening(made) as port:
        text = ask(f"http://127.0.0.1:{port}", "first", "Tell me about a fox.")
    said = capsys.readouterr().out
    assert "served: tales, first" in said
    assert f"first ({made.registry.names.resolve('first').digest[:12]}):{text}" in said
    assert "fox" in text
    assert rated(made)


def test_the_node_client_streams_and_rates(made: Server, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    places = [CLIENTS / "node_modules", *map(Path, filter(None, os.environ.get("NODE_PATH", "").split(os.pathsep)))]
    packages = next((place for place in places if (place / "openai").is_dir()), None)
    if packages is None:
        pytest.skip(f"needs the package openai of npm: run npm install openai in {CLIENTS}, or set NODE_PATH")
    (tmp_path / "node_modules").symlink_to(packages)
    script = tmp_path / "client.mjs"  # the example has no types of TypeScript, so that any Node runs it
    shutil.copy(CLIENTS / "openai_node.ts", script)
    with listening(made) as port:
        command = [node, str(script), f"http://127.0.0.1:{port}", "first", "Tell me about a fox."]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("first:\n")
    assert "fox" in done.stdout
    assert rated(made)
