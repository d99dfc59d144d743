"""`lorakit diff`: how two adapters of one base differ, in their settings and in what they do to each weight."""

from __future__ import annotations

import json as jsonlib
import statistics
from collections import ChainMap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.combine import ADVICE
from lorakit.cli.screen import Screen, few, in_options, screen, table
from lorakit.cli.sources import BASE_HELP, load_adapter, weights_if_asked

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lorakit.combining import Difference, Gap

_COLUMNS = ("weights", "layers", "|A|", "|B|", "|A - B| / larger", "cos(A, B)")
_LONGEST = 48
"""Of a setting's value on the screen; --json has it whole."""


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="The folder of a run, or an adapter.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one of the same base.")],
    base: Annotated[str | None, typer.Option(help=BASE_HELP)] = None,
    modules: Annotated[bool, typer.Option("--modules", help="List every weight.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say how two adapters differ.

    What they were set to, and what they do to each weight.
    """
    with screen(json) as out:
        from lorakit.combining import difference

        states = {given: load_adapter(given, base) for given in (first, second)}
        weights = [weights_if_asked(given, state, "diff") or {} for given, state in states.items()]
        with in_options(ADVICE):
            found = difference(states[first], states[second], ChainMap(*weights))  # type: ignore[arg-type]  # read only
        out.say(f"A: {first}", f"B: {second}", "")
        _show(out, found, modules)
        out.say(*(f"- {line}" for line in _findings(found)))
        out.result({
            "first": first,
            "second": second,
            "same": found.same,
            "settings": {name: list(values) for name, values in found.settings.items()},
            "total": _plain(found.total),
            "weights": {key: _plain(gap) for key, gap in found.weights.items()},
            "tensors": {name: _plain(gap) for name, gap in found.tensors.items()},
            "moving": {name: _plain(gap) for name, gap in found.moving.items()},
        })  # fmt: skip


def _show(out: Screen, found: Difference, every: bool) -> None:
    if found.settings:
        set_to = [(name, _short(one), _short(other)) for name, (one, other) in found.settings.items()]
        out.show(table("settings that differ", "setting", "A", "B", rows=set_to))
    by_kind: dict[str, list[Gap]] = {}
    for key, gap in found.weights.items():
        by_kind.setdefault(key.rpartition(".")[2], []).append(gap)
    drawn: dict[str, Mapping[str, Sequence[Gap]]] = {"medians over layers": by_kind}
    if every:
        drawn["every weight"] = {key: [gap] for key, gap in found.weights.items()}
    for title, groups in drawn.items() if found.weights else ():
        rows = [_row(name, gaps) for name, gaps in groups.items()]
        out.show(table(title, *_COLUMNS, rows=rows, numbers=range(1, len(_COLUMNS))))


def _row(name: str, gaps: Sequence[Gap]) -> tuple[str, ...]:
    cosines = [gap.alignment for gap in gaps if gap.alignment is not None]
    return (
        name,
        f"{len(gaps)}",
        f"{statistics.median(gap.first for gap in gaps):.3g}",
        f"{statistics.median(gap.second for gap in gaps):.3g}",
        f"{statistics.median(gap.relative for gap in gaps):.2%}",
        f"{statistics.median(cosines):+.3f}" if cosines else "",
    )


def _findings(found: Difference) -> Iterator[str]:
    """Yield what to know first: whether they are one, by how much they are not, what only one of them has."""
    if found.same:
        yield "they do the same to the base" + (", though they are set otherwise" if found.settings else "")
        return
    if found.weights:
        whole = found.total
        cosine = "" if whole.alignment is None else f", cosine {whole.alignment:+.3f}"
        yield (
            f"of all weights together |A| is {whole.first:.3g}, |B| {whole.second:.3g}, "
            f"|A - B| {whole.apart:.3g}{cosine}"
        )
    alone = {
        "A": [key for key, gap in found.weights.items() if gap.first and not gap.second],
        "B": [key for key, gap in found.weights.items() if gap.second and not gap.first],
    }
    yield from (f"only {name} changes {len(keys)} weights: {few(keys)}" for name, keys in alone.items() if keys)
    for what, gaps in (("trained whole", found.tensors), ("of updates that depend on the input", found.moving)):
        if names := [name for name, gap in gaps.items() if gap.apart]:
            yield f"{len(names)} tensors {what} differ: {few(names)}"


def _plain(gap: Gap) -> dict[str, float | None]:
    return {"first": gap.first, "second": gap.second, "apart": gap.apart, "relative": gap.relative,
            "alignment": gap.alignment}  # fmt: skip


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else jsonlib.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
