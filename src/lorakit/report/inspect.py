"""The page of `lorakit inspect`: what an adapter learned, how much of its rank it used, what it amplifies.

It draws the plain values of `--json` and works nothing out but medians, so the page, the object and the terminal agree.
"""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from lorakit import __version__
from lorakit.core.site import layer_of
from lorakit.errors import few
from lorakit.report.html import NOTHING, Html, heat, items, note, page, section, table, tag
from lorakit.report.words import size

Values = Mapping[str, Any]
Number = Callable[[Values], float | None]

KINDS = ("module", "layers", "rank", "needs", "entropy rank", "|dW|", "|dW| / |W|", "amplifies", "cos(dW, W)")
"""The columns of `kinds`."""
MET = ("module", "layers", "alignment", "inputs", "by chance", "disturbed", "disturbs", "forecast")
"""The columns of `met`."""
HELD = ("module", "rank", "of dW", "of W", "random", "|dW|", "|W|", "factor")
"""The columns of `held`."""
EACH = ("module", "shape", "rank", "needs", "entropy", "stable", "|dW|", "|dW| / |W|", "amplifies")
"""The columns of `each`."""
WORDS = ("module", "shape", "forecast")
"""Columns that hold no numbers."""


def inspect_page(found: Values) -> str:
    """Return the HTML page of an inspection, complete in itself: no script, nothing from elsewhere.

    Args:
        found: the object of `lorakit inspect --json`. What was not asked for has no section.
    """
    modules = found["modules"]
    alive = [module for module in modules if not module["dead"]]
    return page(
        f"Inspected: {found['adapter']}",
        _opening(found),
        section("Look at this first", items(findings(found), class_="warnings")),
        section("By kind of module", _table(KINDS, kinds(found)), note("Medians over the layers. " + _key(found))),
        section("Rank used", *_maps(found)),
        section("Spectra", *_spectra(alive, found["energy"])),
        section("Beside the weights", *_weights(alive)),
        section(f"Beside {found['against']}", *_met(found)) if found["against"] else NOTHING,
        section("Every module", _each(modules)),
        tag("footer", f"lorakit {__version__}. W is the base's weight, dW the adapter's change of it; |.| is the "
            "Frobenius norm. Definitions and sources: docs/inspect.md."),
    )  # fmt: skip


def findings(found: Values) -> list[str]:
    """Return what a user should know first, the worst before the rest."""
    modules, lines = found["modules"], []
    dead = [module["key"] for module in modules if module["dead"]]
    if dead:
        lines.append(f"{len(dead)} of {len(modules)} updates are exactly 0, so they do nothing: {few(dead)}")
    full = [module["key"] for module in modules if module["saturated"]]
    if full:
        lines.append(
            f"{len(full)} of {len(modules)} updates spread over nearly all directions they have, so more rank might be "
            f"used there (it need not help): {few(full)}"
        )
    needs, ranks = (sum(module[word] for module in modules) for word in ("needs", "rank"))
    if needs and needs < ranks:
        kept = sum(module["needs"] * sum(module["shape"]) for module in modules)
        command = shlex.join(["lorakit", "compress", found["adapter"], "--energy", f"{found['energy']:g}"])
        lines.append(
            f"{needs:,} of {ranks:,} directions hold {found['energy']:.0%} of each update's energy; the others, "
            f"{1 - needs / ranks:.0%} of them, hold the rest"
            + (f" ({command} --output DIR)" if kept < found["update_parameters"] else "")
        )
    intruding = [module for module in modules if module["intruders"]]
    if intruding:
        count = sum(module["intruders"] for module in intruding)
        lines.append(
            f"{count} intruder dimension(s) in {len(intruding)} weights: strong directions of W + dW that W has "
            f"nothing like, which go with forgetting (arXiv 2410.21228): {few([m['key'] for m in intruding])}"
        )
    elif counted := sum(module["intruders"] is not None for module in modules):
        lines.append(f"no intruder dimension in {counted} weights: W + dW has no strong direction that W lacks")
    if found["against"]:
        lines.append(forecast(found))
    return lines


def forecast(found: Values) -> str:
    """Return what two adapters do to each other, in a sentence."""
    met = [module["interference"] for module in found["modules"] if module["interference"]]
    words = {
        "repeat": "repeat each other",
        "cancel": "cancel each other",
        "disturb": "disturb each other",
        "disturbed": "are disturbed by it",
        "disturbs": "disturb it",
        "apart": "leave each other alone",
    }
    counts = {said: sum(one["forecast"] == word for one in met) for word, said in words.items()}
    told = ", ".join(f"{count} {said}" for said, count in counts.items() if count) or "no layer is changed by both"
    alone = len(found["only_first"]) + len(found["only_second"])
    return f"with {found['against']}: {told}" + (f"; {alone} layers are changed by one of them alone" if alone else "")


def kinds(found: Values) -> list[tuple[str, ...]]:
    """Return a row for each kind of module: how many layers have it, and medians over them."""
    return [
        (
            name,
            f"{len(group)}",
            _middle(group, lambda m: m["rank"], ".0f"),
            _middle(group, lambda m: m["needs"], ".0f"),
            _middle(group, lambda m: m["effective_ranks"]["entropy"], ".1f"),
            _middle(group, lambda m: m["norm"], ".3g"),
            _middle(group, lambda m: m["norm_ratio"], ".2%"),
            _middle(group, _factor, ".3g"),
            _middle(group, lambda m: m["correlation"], "+.3f"),
        )
        for name, group in _by_kind(found["modules"]).items()
    ]


def met(found: Values) -> list[tuple[str, ...]]:
    """Return a row for each kind of module that both adapters change: medians over the layers."""
    both = [{"key": m["key"], **m["interference"]} for m in found["modules"] if m["interference"]]
    return [
        (
            name,
            f"{len(group)}",
            _middle(group, lambda m: m["alignment"], "+.3f"),
            _middle(group, lambda m: m["inputs"], ".3f"),
            _middle(group, lambda m: m["inputs_by_chance"], ".3f"),
            _middle(group, lambda m: m["disturbed"], ".2f"),
            _middle(group, lambda m: m["disturbs"], ".2f"),
            ", ".join(sorted({one["forecast"] for one in group})),
        )
        for name, group in _by_kind(both).items()
    ]


def held(found: Values) -> list[tuple[str, ...]]:
    """Return table 7 of the LoRA paper, a row for each kind of module: medians over the layers of what W holds."""
    known = [{"key": m["key"], **m["amplification"]} for m in found["modules"] if m["amplification"]]
    columns = ("rank", "update", "weight", "random", "update_norm", "weight_norm", "factor")
    return [
        (name, *(_middle(group, lambda m, column=column: m[column], ".3g") for column in columns))  # type: ignore[misc]
        for name, group in _by_kind(known).items()
    ]


def each(modules: Iterable[Values]) -> list[tuple[str, ...]]:
    """Return a row for each module."""
    return [
        (m["key"], " x ".join(map(str, m["shape"])), f"{m['rank']}", f"{m['needs']}",
         *(f"{m['effective_ranks'][name]:.2f}" for name in ("entropy", "stable")), f"{m['norm']:.4g}",
         *(_middle([m], number, form) for number, form in ((lambda m: m["norm_ratio"], ".2%"), (_factor, ".3g"))))
        for m in modules
    ]  # fmt: skip


def _opening(found: Values) -> Html:
    modules = found["modules"]
    on = f" on {found['base']}" if found["base"] else ""
    whole = f", and {len(found['trained_whole'])} tensors of the base trained whole" if found["trained_whole"] else ""
    ranks, needs = (statistics.median(m[word] for m in modules) for word in ("rank", "needs"))
    tiles = {
        "updates": f"{len(modules):,}",
        "parameters": f"{found['parameters']:,}",
        "rank, median": f"{ranks:g}",
        f"rank that holds {found['energy']:.0%} of the energy, median": f"{needs:g}",
    }
    return tag(
        "header",
        tag("h1", found["adapter"]),
        tag("p", f"{found['method']}{on}, {size(found['bytes'])}{whole}."),
        tag("dl", *(tag("div", tag("dt", what), tag("dd", value)) for what, value in tiles.items()), class_="tiles"),
    )


def _key(found: Values) -> str:
    said = f"needs: the lowest rank that holds {found['energy']:.0%} of the energy. "
    if any(module["amplification"] for module in found["modules"]):
        said += "amplifies: how many times larger dW is in its own directions than W is there."
    return said


def _maps(found: Values) -> Iterator[Html]:
    modules = found["modules"]
    yield from _map(modules, lambda m: m["effective_ranks"]["entropy"], "Effective rank (entropy), by layer", ".1f")
    yield from _map(modules, lambda m: m["needs"], f"Rank that holds {found['energy']:.0%} of the energy", ".0f")


def _weights(alive: Sequence[Values]) -> Iterator[Html]:
    known = [module for module in alive if module["amplification"]]
    if not known:
        return
    yield _table(HELD, held({"modules": known}))
    yield note(
        "What W holds of the leading directions of dW, of as many of its own, and of random ones: |U^T W V|. More than "
        "of random ones, and a large factor: dW brings up what W has and hardly uses (arXiv 2106.09685, table 7). "
        "Medians over the layers."
    )
    yield from _map(known, _factor, "Amplification factor, by layer", ".3g")
    yield from _map(known, lambda m: m["norm_ratio"], "|dW| / |W|, by layer", ".1%")
    if any(module["intruders"] is not None for module in known):
        yield from _map(known, lambda m: m["intruders"], "Intruder dimensions among the first 10, by layer", ".0f")
    lines = {name: {f"layer {_layer(m)}": m["amplification"]["decay"] for m in group}
             for name, group in _by_kind(known).items()}  # fmt: skip
    yield _plots("Singular values of W, the largest", lines, y="singular value")


def _spectra(alive: Sequence[Values], share: float) -> Iterator[Html]:
    for what, y, log, values in (
        ("Singular values of dW over the largest", "over the largest", True, _falls),
        ("Energy of the first directions of dW", "share of the energy", False, lambda m: m["energy"]),
    ):
        lines = {name: {f"layer {_layer(m)}": values(m) for m in group} for name, group in _by_kind(alive).items()}
        yield _plots(what, lines, y=y, log=log, marks=None if log else {f"{share:.0%}": share})


def _plots(what: str, kinds: Mapping[str, Mapping[str, Sequence[float]]], **look: Any) -> Html:
    """Return a plot for each kind of module, a line in it for each layer."""
    from lorakit.report.plots import curves

    drawn = [curves(name, lines, x="direction", **look) for name, lines in kinds.items()]
    said = tag("figcaption", f"{what}, a line for each layer")
    return tag("figure", said, tag("div", *drawn, class_="plots")) if drawn else NOTHING


def _met(found: Values) -> Iterator[Html]:
    from lorakit.report.plots import grid

    yield _table(MET, met(found))
    yield note(
        "alignment: cos of the two changes. inputs: how alike the directions are that they read, from 0 to 1, and by "
        "chance. disturbed: what the other adds on the inputs this one reads, over what this one says there."
    )
    both = [module for module in found["modules"] if module["interference"]]
    yield from _map(both, lambda m: m["interference"]["alignment"], "Alignment, by layer", "+.2f")
    yield from _map(both, lambda m: m["interference"]["disturbed"], "Disturbed, by layer", ".2f")
    drawn = [
        grid(name, _middle_grid([m["similarity"] for m in group]), x="directions of the other", y="directions of this")
        for name, group in _by_kind([m for m in both if m["similarity"]]).items()
    ]
    if drawn:
        said = "Similarity of the first i and j input directions (arXiv 2106.09685, figures 3, 4); medians over layers"
        yield tag("figure", tag("figcaption", said), tag("div", *drawn, class_="plots"))


def _each(modules: Sequence[Values]) -> Html:
    listed = _table(EACH, each(modules))
    return tag("details", tag("summary", f"All {len(modules):,} modules"), listed) if modules else NOTHING


def used(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]], list[int]]:
    """Return the columns in which anything stands, their rows, and the places of those that hold numbers."""
    kept = [place for place in range(len(columns)) if any(row[place] for row in rows)]
    names = [columns[place] for place in kept]
    numbers = [place for place, name in enumerate(names) if name not in WORDS]
    return names, [[row[place] for place in kept] for row in rows], numbers


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    names, kept, numbers = used(columns, rows)
    return table(names, kept, numbers=numbers, class_="modules")


def _map(modules: Sequence[Values], number: Number, title: str, form: str) -> Iterator[Html]:
    """Yield a map of one number: kinds of modules in rows, layers in columns."""
    groups = _by_kind(modules)
    layers = sorted({_layer(module) for module in modules}, key=lambda name: (len(name), name))
    rows = {
        name: [next((number(m) for m in group if _layer(m) == layer), None) for layer in layers]
        for name, group in groups.items()
    }
    if drawn := heat(layers, rows, form):
        yield tag("figure", tag("figcaption", title), drawn)


def _by_kind(modules: Iterable[Values]) -> dict[str, list[Values]]:
    """Return the modules by their name within a layer, in their order."""
    groups: dict[str, list[Values]] = {}
    for module in modules:
        place = layer_of(module["key"])
        name = module["key"] if place is None else module["key"].partition(f"{place[0]}.{place[1]}.")[2] or place[0]
        groups.setdefault(name, []).append(module)
    return groups


def _layer(module: Values) -> str:
    place = layer_of(module["key"])
    return "" if place is None else str(place[1])


def _factor(module: Values) -> float | None:
    held = module["amplification"]
    return None if held is None else held["factor"]


def _falls(module: Values) -> list[float]:
    values = module["singular_values"]
    return [value / values[0] for value in values[: module["rank"]]]


def _middle(group: Sequence[Values], number: Number, form: str) -> str:
    """Return the median of a number where it is known."""
    found = [value for value in map(number, group) if value is not None]
    return format(statistics.median(found), form) if found else ""


def _middle_grid(grids: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """Return the median of grids, place by place, where all of them have a value."""
    height, width = min(map(len, grids)), min(len(one[0]) for one in grids)
    return [[statistics.median(one[i][j] for one in grids) for j in range(width)] for i in range(height)]
