"""The documents tell the truth: their commands run, their links lead somewhere, and both READMEs say the same.

A fenced bash or python block that follows the line `<!-- test -->` is run, in order with its neighbours, in one empty
folder.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.ko.md")
FENCE = re.compile(r"^(?:<!-- (test) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, and whether tests run it (`test` or nothing)."""

    language: str
    text: str
    mark: str


def blocks(markdown: str) -> list[Block]:
    """Return the fenced blocks of a document in order."""
    return [Block(language, text, mark) for mark, language, text in FENCE.findall(markdown)]


def run(story: list[Block], folder: Path) -> list[str]:
    """Run marked blocks one after the other in `folder`, stop at the first failure and return it with its output."""
    bin_folder = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "NO_COLOR": "1"}
    commands = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
    for block in story:
        done = subprocess.run(
            [*commands[block.language], block.text],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=280,
        )
        if done.returncode:
            return [f"exit {done.returncode}:\n{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"]
    return []


def dead_links(root: Path, documents: list[Path]) -> list[str]:
    """Return every relative link that leads to no file, as `document: link`."""
    dead = []
    for document in documents:
        prose = FENCE.sub("", document.read_text(encoding="utf-8"))
        for link in LINK.findall(prose):
            target = link.split("#")[0]
            if target and ":" not in target and not (document.parent / target).exists():
                dead.append(f"{document.relative_to(root)}: {link}")
    return dead


def tree(markdown: str) -> set[str]:
    """Return the folders of src/lorakit that a README's drawing of the repository names, as `name/`."""
    drawing = next(block.text for block in blocks(markdown) if "src/lorakit/" in block.text)
    inside = drawing.split("src/lorakit/", 1)[1]
    return set(re.findall(r"^ {2}(\w+/)", inside, re.MULTILINE))


def documents() -> list[Path]:
    """Return every page; README.ko.md has the blocks of README.md, so it is not run a second time."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def stories() -> list[Path]:
    """Return the pages with blocks to run."""
    marked = [page for page in documents() if any(b.mark for b in blocks(page.read_text(encoding="utf-8")))]
    return [page for page in marked if page.name != "README.ko.md"]


def test_the_readme_is_among_the_documents_that_run() -> None:
    assert ROOT / "README.md" in stories()


@pytest.mark.parametrize("document", stories(), ids=lambda path: path.name)
def test_a_document_s_commands_run(tmp_path: Path, document: Path) -> None:
    story = [block for block in blocks(document.read_text(encoding="utf-8")) if block.mark == "test"]
    failures = run(story, tmp_path)
    assert not failures, failures[0]


def test_both_readmes_give_the_same_commands() -> None:
    english, korean = (blocks((ROOT / name).read_text(encoding="utf-8")) for name in READMES)
    commands = [[b for b in found if b.language in ("bash", "python", "yaml")] for found in (english, korean)]
    assert commands[0] == commands[1]


@pytest.mark.parametrize("name", READMES)
def test_the_drawn_tree_is_the_tree(name: str) -> None:
    drawn = tree((ROOT / name).read_text(encoding="utf-8"))
    package = ROOT / "src" / "lorakit"
    files = [file for file in package.glob("*/**/*") if file.is_file() and "__pycache__" not in file.parts]
    rooms = {f"{file.relative_to(package).parts[0]}/" for file in files}
    assert drawn == rooms, f"{name} lacks {sorted(rooms - drawn)} and invents {sorted(drawn - rooms)}"


@pytest.mark.parametrize("name", READMES)
def test_the_readme_s_figures_are_those_on_record(name: str) -> None:
    kept = {file.stem: json.loads(file.read_text()) for file in (ROOT / "docs" / "results").glob("*.json")}
    jobs, batch = kept["train-vs-peers"], kept["serving"]["results"]["m768"]
    runs = [run for run in kept["glue"]["runs"] if run["dtype"] == kept["glue"]["dtypes"][run["task"]]]
    seeds: dict[tuple[str, str, float], list[float]] = {}
    for run in runs:
        seeds.setdefault((run["task"], run["method"], run["lr"]), []).append(run["test"])
    chosen = {key[:2]: statistics.median(scores) for key, scores in seeds.items() if len(scores) == 3}
    figures = [
        *(f"{jobs[job]['ratios'][what]:.2f}" for job in ("e2e", "sst2") for what in ("seconds", "peak_mb")),
        f"{len(kept['plan']['memory'])}",
        f"{100 * max(abs(case['error']) for case in kept['plan']['memory']):.2f} %",
        *(f"{chosen[task, method]:.1f}" for task in ("trec", "sst2", "mrpc") for method in ("lora-all", "full")),
        f"{batch['peft']['peft']['ratio']:.1f}",
        f"{batch['vllm']['vllm, 16 adapters']['ratio']:.1f}",
        f"{kept['spectra']['spectrum']['ratio']:,}",
    ]
    table = [line for line in (ROOT / name).read_text().splitlines() if line.startswith("|") and "](docs/" in line]
    in_order = ".*?".join(rf"(?<![\d.,]){re.escape(figure)}(?!\d)" for figure in figures)
    assert re.search(in_order, " ".join(table)), f"{name} does not tell {figures}, in this order"


def test_every_relative_link_leads_somewhere() -> None:
    assert not dead_links(ROOT, documents())


def test_a_failing_block_and_a_dead_link_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "[here](page.md#top) [web](https://example.org) [gone](gone.md)\n\n"
        "<!-- test -->\n```bash\necho one > made\n```\n\n"
        "```bash\nexit 1\n```\n\n"
        "<!-- test -->\n```python\nassert open('made').read() == 'one\\n'\n```\n\n"
        "<!-- test -->\n```bash\nfalse | cat\n[not](a-link.md)\n```\n"
    )
    found = blocks(page.read_text())
    assert [(block.language, block.mark) for block in found] == [
        ("bash", "test"),
        ("bash", ""),
        ("python", "test"),
        ("bash", "test"),
    ]
    assert run([found[0], found[2]], tmp_path) == []
    assert run([found[3], found[1]], tmp_path)[0].startswith("exit 1:\nfalse | cat")
    assert dead_links(tmp_path, [page]) == ["page.md: gone.md"]
