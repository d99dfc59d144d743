"""Pages that verbs write beside what they say: where they may go."""

from __future__ import annotations

from pathlib import Path

from lorakit.errors import RecipeError


def refuse_to_overwrite(page: Path) -> None:
    """Raise `RecipeError` for a place a page cannot be written to, and for a file that is none of our pages."""
    if not page.parent.is_dir():
        raise RecipeError(f"--html {page}: there is no folder {page.parent}")
    if page.exists() and not (page.is_file() and page.read_bytes()[:15].lower() == b"<!doctype html>"):
        raise RecipeError(f"--html {page} is there already, and is no page; name another file")


def write_page(page: Path, text: str) -> None:
    """Write a page whole or not at all."""
    from lorakit.persist.atomic import write_file

    write_file(page, text)
