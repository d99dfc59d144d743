"""`lorakit inspect`: what an adapter learned, how much of its rank it used, and what another one would do to it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.pages import refuse_to_overwrite, write_page
from lorakit.cli.screen import Screen, screen, table
from lorakit.cli.sources import ALPHA_HELP, ENABLED_HELP, adapter_in, on_base, switches, weights_under, with_widths
from lorakit.errors import AdapterFileError, RecipeError, SpecError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from lorakit.core.state import AdapterState


def inspect(
    source: Annotated[str, typer.Argument(help="An adapter: a directory, a run's folder, or a loralib .bin file.")],
    base: Annotated[
        str | None, typer.Option(help="Its base: what the weights hold already, and what the adapter amplifies.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Another adapter of the same base: what the two do to each other.")
    ] = None,
    energy: Annotated[float, typer.Option(help="The share of an update's energy that says which rank it needs.")] = 0.9,
    intruders: Annotated[
        bool, typer.Option("--intruders", help="With --base, also count intruder dimensions: two dense SVDs a weight.")
    ] = False,
    alpha: Annotated[float | None, typer.Option(help=ALPHA_HELP)] = None,
    enabled: Annotated[str | None, typer.Option(help=ENABLED_HELP)] = None,
    modules: Annotated[bool, typer.Option("--modules", help="List every module.")] = False,
    html: Annotated[str | None, typer.Option("--html", help="Also write a page to this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what an adapter learned, and how much of its rank it used."""
    with screen(json) as out:
        from lorakit.report.inspect import inspect_page
        from lorakit.report.plots import need_plots
        from lorakit.spectral.inspection import inspect as looked_at

        if html is not None:
            need_plots()
            refuse_to_overwrite(Path(html))
        if intruders and base is None:
            raise RecipeError("--intruders compares W + dW with W; name the base with --base, or leave it out")
        if not 0 < energy <= 1:
            raise RecipeError(f"--energy is a share above 0 and up to 1, not {energy:g}; 0.9 is the usual")
        state, other = _adapters(source, against, alpha, enabled)
        if base is not None:
            state = with_widths(on_base(state, base))
        more = {"--against": against, "--alpha": alpha, "--enabled": enabled}
        given = [str(word) for option in more.items() if option[1] is not None for word in option]
        again = shlex.join(["lorakit", "inspect", source, "--base", state.base.name or "BASE", *given])
        for name, one in ((source, state), (against, other)):
            if one is not None:
                _refuse_unfit(str(name), one, base, again)
        weights = None if base is None else weights_under(state, base, "inspect")
        found = looked_at(state, weights, other, energy=energy, count_intruders=intruders)
        values: dict[str, Any] = {
            "adapter": source,
            "base": base,
            "against": against,
            "method": state.spec.name,
            "parameters": state.parameters,
            "bytes": sum(t.nbytes for u in state.updates for t in u.tensors.values()),
            "update_parameters": state.parameters - sum(t.numel() for t in state.trained.values()),
            "trained_whole": sorted(state.trained),
            **found.to_json(),
        }
        _show(out, values, modules)
        if base is None:
            out.say("", f"what it amplifies: {again}")
        if html is not None:
            write_page(Path(html), inspect_page(values))
            out.say("", f"wrote {html}")
        out.result(values)


def _adapters(
    source: str, against: str | None, alpha: float | None, enabled: str | None
) -> tuple[AdapterState, AdapterState | None]:
    """Return both adapters; what is told beside them is for those of loralib, which do not say it themselves."""
    from lorakit.persist import LORALIB, load

    told: dict[str, Any] = {"alpha": alpha, "enabled": switches(enabled)}
    places = [adapter_in(given) for given in (source, against) if given is not None]
    old = [place for place in places if place.suffix in LORALIB] or places[:1]
    state, *others = (load(place, **(told if place in old else {})) for place in places)
    if not state.updates:
        raise AdapterFileError(f"{source} trained tensors of the base whole and has no update to look at")
    return state, others[0] if others else None


def _refuse_unfit(given: str, state: AdapterState, base: str | None, again: str) -> None:
    """Raise `SpecError` for an adapter that has no spectrum, or none without a base: `again` names it."""
    from lorakit.core.state import leans_on_weights
    from lorakit.spectral.spectrum import refuse_unfit

    try:
        refuse_unfit(state)
    except SpecError as error:
        raise SpecError(f"{given}: {error}") from error
    if base is None and leans_on_weights(state):
        raise SpecError(
            f"{given}: what {state.spec.name} changes depends on the weights of the base; name it:\n  {again}"
        )


def _show(out: Screen, values: dict[str, Any], every: bool) -> None:
    """Draw what is known, by kind of module and, if asked, for every module; then say what to know first."""
    from lorakit.report import inspect as report

    on = f" on {values['base']}" if values["base"] else ""
    out.say(f"{values['adapter']}: {values['method']}{on}, {len(values['modules'])} updates, "
            f"{values['parameters']:,} parameters", "")  # fmt: skip
    title = f"medians over layers; needs: rank for {values['energy']:.0%} of the energy"
    drawn: list[tuple[str, tuple[str, ...], Any]] = [(title, report.KINDS, report.kinds)]
    if values["base"]:
        drawn.append(("what W holds of directions of dW, of W, at random: |U^T W V|", report.HELD, report.held))
    if values["against"]:
        drawn.append((f"with {values['against']}", report.MET, report.met))
    for title, columns, rows in drawn:
        out.show(_drawn(title, columns, rows(values)))
    if every:
        out.show(_drawn("", report.EACH, report.each(values["modules"])))
    out.say(*(f"- {line}" for line in report.findings(values)))


def _drawn(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> RenderableType:
    from lorakit.report.inspect import used

    names, kept, numbers = used(columns, rows)
    return table(title, *names, rows=kept, numbers=numbers)
