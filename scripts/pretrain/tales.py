"""Turn the plain-text books into documents of clean paragraphs.

The books come with title pages, contents lists, hard-wrapped lines and typographic quotes. A model this small should
spend nothing on those, so they are dropped or folded to ASCII here; a heading ends a document.
"""

import re
from pathlib import Path

HELD_OUT = ("the-lilac-fairy-book", "the-marvelous-land-of-oz")
FOLD = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "…": "...", "\u00a0": " ", "\ufeff": ""})
ENDING = re.compile(r"[.!?,;:)\]\"'-]$")


def read_books(folder: Path) -> dict[str, list[str]]:
    """Map each book's name to its documents (one per chapter or tale), paragraphs joined by one newline."""
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise SystemExit(f"{folder}: no *.txt books found; pass --data with the folder that holds the tales")
    return {file.stem: documents(file.read_text(encoding="utf-8")) for file in files}


def documents(text: str) -> list[str]:
    """Split one book at its headings; keep documents of at least 400 characters."""
    found: list[list[str]] = [[]]
    for block in re.split(r"\n\s*\n", text.translate(FOLD).replace("\r", "")):
        lines = [line for line in block.split("\n") if line.strip()]
        if not lines or lines[0].lstrip().startswith("[") or "line-art drawing" in block or block.strip().isdigit():
            continue
        lines[0] = re.sub(r"^\s*\d+\s+(?=[a-z])", "", lines[0])  # page numbers left in the text of one book
        if is_heading(lines):
            found.append([])
        elif not is_contents(lines):
            found[-1].append(join(lines))
    texts = ("\n".join(paragraphs) for paragraphs in found)
    return [text for text in texts if len(text) >= 400]


def is_heading(lines: list[str]) -> bool:
    """Say whether a block is a title: upper case, a chapter number, or one short line that ends no sentence."""
    text = " ".join(lines).strip()
    if len(lines) > 2 or len(text) >= 80:
        return False
    return text.upper() == text or bool(re.match(r"(?i)(chapter|part|book)\b", text)) or not ENDING.search(text)


def is_contents(lines: list[str]) -> bool:
    """Say whether a block is a list of titles: several lines of which few end in punctuation."""
    ended = sum(bool(ENDING.search(line.strip())) for line in lines)
    width = sum(map(len, lines)) / len(lines)
    return len(lines) >= 3 and ended < 0.34 * len(lines) and (width < 45 or lines[0].startswith("  "))


def join(lines: list[str]) -> str:
    """Undo the line wrapping; indented short lines are verse and keep their breaks."""
    verse = len(lines) > 1 and all(line.startswith("  ") and len(line.strip()) < 60 for line in lines)
    text = ("\n" if verse else " ").join(re.sub(r"\s+", " ", line).strip() for line in lines)
    return re.sub(r"_([^_]+)_", r"\1", text)
