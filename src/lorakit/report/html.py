"""Pages of one file, for any browser: no script, nothing from elsewhere, and no text that could be taken for markup.

`tag` escapes whatever is put into it but what `tag` made, so a name like `<script>` is harmless wherever it stands. The
page also forbids the browser to load anything.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from math import isfinite

from lorakit.report.words import size

Bar = tuple[str, Mapping[str, int], str]
"""A name, bytes by part, and what is said of it beside the total."""
_NAMED_FROM = 0.18
"""The share of a bar from which a part has room for its own name."""
_MAY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a page may load: pictures that are written into it, and nothing else."""


class Html(str):
    """Text that is markup already; any other is escaped where it is put in."""

    __slots__ = ()


NOTHING = Html("")


def tag(name: str, *inside: str, **attributes: str | None) -> Html:
    """Return an element; `class_` and `aria_label` are `class` and `aria-label`, attributes of None are left out.

    The text in it, and the values of attributes, are escaped, save `Html`; control characters become U+FFFD.
    """
    kept = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    opening = "".join(f' {key}="{_escaped(value)}"' for key, value in kept.items())
    return Html(f"<{name}{opening}>{join(*inside)}</{name}>")


def join(*parts: str) -> Html:
    """Return parts one after the other, escaped save `Html`."""
    return Html("".join(part if isinstance(part, Html) else _escaped(part) for part in parts))


def section(title: str, *content: Html) -> Html:
    """Return what stands under a heading, or nothing where there is none of it."""
    return tag("section", tag("h2", title), *content) if any(content) else NOTHING


def note(text: str) -> Html:
    """Return a remark under a drawing."""
    return tag("p", text, class_="note")


def items(texts: Iterable[str], class_: str | None = None) -> Html:
    """Return a list, or nothing where it is empty."""
    found = [tag("li", text) for text in texts]
    return tag("ul", *found, class_=class_) if found else NOTHING


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[int] = (), class_: str | None = None
) -> Html:
    """Return a table that scrolls by itself where the page is narrow, or nothing without rows.

    Args:
        columns: their names; the first names each row.
        numbers: the places of columns that are right-aligned.
    """

    def cells(row: Sequence[str], heading: bool) -> Html:
        return tag("tr", *(
            tag("th" if heading or not place else "td", text, class_="number" if place in numbers else None,
                scope="col" if heading else None if place else "row")
            for place, text in enumerate(row)
        ))  # fmt: skip

    body = [cells(row, False) for row in rows]
    if not body:
        return NOTHING
    drawn = tag("table", tag("thead", cells(columns, True)), tag("tbody", *body), class_=class_)
    return tag("div", drawn, class_="scroll")


def heat(columns: Sequence[str], rows: Mapping[str, Sequence[float | None]], form: str) -> Html:
    """Return a table of numbers on grounds that are the darker the larger they are; below 0 in another colour.

    Args:
        columns: their names.
        rows: numbers by the name of the row, None where there is none.
        form: how a number is written, such as `.2f`.
    """
    most = max((abs(value) for row in rows.values() for value in row if value is not None), default=0.0)
    if not columns or not rows:
        return NOTHING

    def cell(value: float | None) -> Html:
        if value is None:
            return tag("td")
        share = min(1.0, abs(value) / most) if most and isfinite(most) else 0.0
        colour = "0 114 178" if value >= 0 else "213 94 0"
        return tag("td", format(value, form), class_="number", style=f"background:rgb({colour} / {60 * share:.0f}%)")

    head = tag("tr", tag("th", ""), *(tag("th", name, class_="number", scope="col") for name in columns))
    body = [tag("tr", tag("th", name, scope="row"), *map(cell, row)) for name, row in rows.items()]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body), class_="heat"), class_="scroll")


def stacked(bars: Sequence[Bar]) -> Html:
    """Return bars of bytes, stacked part by part on one scale, the longest as wide as there is room.

    A part's name is also its class in the style sheet, which has its colour.
    """
    longest = max((sum(parts.values()) for _, parts, _ in bars), default=0)
    if not longest:
        return NOTHING
    return tag("div", *(_bar(name, parts, said, longest) for name, parts, said in bars), class_="bars")


def legend(parts: Iterable[str]) -> Html:
    """Return which colour is which part."""
    return tag("ul", *(tag("li", tag("i", class_=part), part) for part in parts), class_="legend")


def row(name: str, drawing: Html, said: str) -> Html:
    """Return one line of a chart: its name, the drawing, and the value in words."""
    return tag("div", tag("span", name, class_="name"), drawing, tag("span", said, class_="value"), class_="row")


def width(share: float) -> str:
    """Return the style of an element that has this share of the room."""
    return f"width:{100 * share:.4g}%"


def page(title: str, *content: Html) -> str:
    """Return a whole document."""
    style = files("lorakit.report").joinpath("page.css").read_text(encoding="utf-8")
    head = (
        Html('<meta charset="utf-8"/>'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1"/>'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_MAY}"/>'),
        tag("title", title),
        tag("style", Html(style)),
    )
    return f"<!DOCTYPE html>\n{tag('html', tag('head', *head), tag('body', *content), lang='en')}\n"


def _bar(name: str, parts: Mapping[str, int], said: str, longest: int) -> Html:
    held = {part: count for part, count in parts.items() if count}
    drawn = [
        tag("span", part if count >= _NAMED_FROM * longest else "", class_=part, style=width(count / longest),
            title=f"{part} {size(count)}")
        for part, count in held.items()
    ]  # fmt: skip
    words = ", ".join(f"{part} {size(count)}" for part, count in held.items())
    total = size(sum(held.values()))
    return row(name, tag("div", *drawn, class_="track", role="img", aria_label=words), f"{total}{said}")


def _escaped(text: str) -> str:
    return escape("".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text))
