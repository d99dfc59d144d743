"""Plots as pieces of a page: vectors with words a browser can select, in the page's own ink, light or dark.

Each is small, so that a page lays several beside each other where it is wide and under each other where it is not.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.core.lazy import need
from lorakit.report.html import Html

_INK = "#010203"  # written by matplotlib, and turned into the colour of the page's text
_SIZE = (4.0, 2.7)  # inches


def need_plots() -> None:
    """Raise `MissingExtraError` where nothing can be drawn, before anything is computed for it."""
    need("matplotlib", "report")


def curves(
    title: str,
    lines: Mapping[str, Sequence[float]],
    *,
    x: str,
    y: str,
    log: bool = False,
    marks: Mapping[str, float] | None = None,
) -> Html:
    """Return one plot of lines over 1, 2, ..., from dark to bright in their order.

    Args:
        title: over the plot, and its name for those who cannot see it.
        lines: values by name; the first and the last are named in the legend.
        x, y: what the axes are.
        log: whether y grows by factors; values of 0 are left out.
        marks: heights to draw a dotted line at, by what is said there.
    """
    figure, axes, colours = _empty(len(lines))
    for place, (name, values) in enumerate(lines.items()):
        shown = [value if value > 0 or not log else float("nan") for value in values]
        said = name if place in (0, len(lines) - 1) else None
        axes.plot(range(1, len(shown) + 1), shown, color=colours(place), linewidth=1.2, label=said,
                  marker="o" if len(shown) == 1 else None)  # fmt: skip
    for said, height in (marks or {}).items():
        axes.axhline(height, color=_INK, linewidth=0.8, linestyle=":")
        axes.annotate(said, (1, height), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        low, high = axes.get_ylim()
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if high < 10 * low else "")
    axes.legend(frameon=False, fontsize=8, labelcolor=_INK)
    return _drawn(figure, axes, title, x, y)


def grid(title: str, values: Sequence[Sequence[float]], *, x: str, y: str) -> Html:
    """Return a map of values from 0 to 1 over 1, 2, ... in both directions, brighter for more, with its scale."""
    figure, axes, _ = _empty(1)
    size = (0.5, len(values[0]) + 0.5, 0.5, len(values) + 0.5)
    look = {"vmin": 0, "vmax": 1, "cmap": "viridis", "origin": "lower", "aspect": "auto", "interpolation": "nearest"}
    drawn = axes.imshow(values, extent=size, **look)
    figure.colorbar(drawn, ax=axes).outline.set_visible(False)
    return _drawn(figure, axes, title, x, y)


def _empty(count: int) -> tuple[Any, Any, Any]:
    """Return a figure, its axes, and the colours of `count` lines."""
    matplotlib = need("matplotlib", "report")
    new_figure = need("matplotlib.figure", "report").Figure  # of no backend, so of no window
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    with matplotlib.rc_context(dict.fromkeys(inked, _INK)):
        figure = new_figure(figsize=_SIZE, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        axes.spines[["top", "right"]].set_visible(False)
    scale = matplotlib.colormaps["plasma"]
    return figure, axes, lambda place: scale(0.85 * place / max(1, count - 1))


def _drawn(figure: Any, axes: Any, title: str, x: str, y: str) -> Html:
    """Return the figure as an element of a page."""
    matplotlib = need("matplotlib", "report")
    axes.set_title(title, fontsize=10, color=_INK)
    axes.set_xlabel(x, fontsize=9, color=_INK)
    axes.set_ylabel(y, fontsize=9, color=_INK)
    axes.tick_params(labelsize=8, labelcolor=_INK)
    axes.xaxis.get_major_locator().set_params(integer=True)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    svg = text.getvalue()
    return Html(svg[svg.index("<svg") :].replace(_INK, "currentColor"))
