"""`lorakit plan`: what a run will train, hold and take, on one screen, before a weight is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.example import bars, show_example
from lorakit.cli.pages import refuse_to_overwrite, write_page
from lorakit.cli.screen import Screen, screen, size, table
from lorakit.errors import RecipeError

if TYPE_CHECKING:
    from lorakit.planning.memory import Forecast
    from lorakit.training.planned import PlannedRun
    from lorakit.training.recipe import Recipe


def plan(
    source: Annotated[
        str | None, typer.Argument(help="A recipe, a base (name or directory), or a config.json alone.")
    ] = None,
    shape: Annotated[str | None, typer.Option(help="A well-known shape instead, such as llama-2-7b.")] = None,
    set: Annotated[
        list[str] | None, typer.Option("--set", help="Change a value: --set adapter.rank=64; may be repeated.")
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option("--compare", help="Another recipe to put beside it; may be repeated.")
    ] = None,
    device: Annotated[
        list[str] | None, typer.Option("--device", help='"A100 80GB", "24 GB", ...; may be repeated.')
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="How many of the device share the work.")] = 1,
    strategy: Annotated[
        str | None, typer.Option(help="ddp, fsdp, hybrid or zero3; as train.parallel says if left out.")
    ] = None,
    watts: Annotated[float | None, typer.Option(min=0, help="Of one device at work, for the energy.")] = None,
    price_per_kwh: Annotated[float | None, typer.Option(min=0, help="Of energy, in your currency.")] = None,
    price_per_hour: Annotated[float | None, typer.Option(min=0, help="Of one device, in your currency.")] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Run a few steps, the heaviest batch first, and forecast from them.")
    ] = False,
    modules: Annotated[bool, typer.Option("--modules", help="List every module.")] = False,
    advice: Annotated[bool, typer.Option("--advice", help="Say the reason and the source of each advice.")] = False,
    html: Annotated[str | None, typer.Option("--html", help="Also write a page to this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a run will train, hold and take."""
    with screen(json) as out:
        from lorakit.training.plan import calibrated
        from lorakit.training.plan import plan as planned
        from lorakit.training.planned import Where

        if html is not None:
            refuse_to_overwrite(Path(html))
        if strategy not in (None, "single") and gpus == 1:
            raise RecipeError(f"--strategy {strategy} divides the work among several devices; say how many with --gpus")
        where = Where(tuple(device or ()), gpus, strategy, watts, price_per_kwh, price_per_hour)
        recipe, model = _subject(source, shape, set or [])
        found = planned(recipe, where, model=model)
        if calibrate:
            if not recipe.data.train or model is not None:
                raise RecipeError(
                    "--calibrate runs steps, so it needs a recipe with data.train and a base with weights"
                )
            out.note("running a few steps, the heaviest batch first ...")
            found = calibrated(found, recipe)
        others = {name: planned(*_other(name, set or [], where), model=model) for name in compare or []}
        values = found.to_json()
        _show(out, found, values, modules, advice)
        if others:
            values["compared"] = {name: other.to_json() for name, other in others.items()}
            _say_compared(out, {source or shape or recipe.model: values, **values["compared"]})
        if html is not None:
            from lorakit.report.plan import plan_page

            write_page(Path(html), plan_page(values))
            out.say("", f"wrote {html}")
        out.result(values)


def _subject(source: str | None, shape: str | None, changes: list[str]) -> tuple[Recipe, Any]:
    """Return the recipe, and the empty model of a base that is only a configuration."""
    from lorakit.cli.train import changes_of
    from lorakit.training.recipe import load_recipe, make_recipe

    if (source is None) == (shape is None):
        raise RecipeError("give a recipe, a base or a config.json, or --shape NAME; one of them")
    wanted = changes_of(changes)
    if shape is not None:
        from lorakit.planning.shapes import shape as named

        return _bare(shape, named(shape), wanted)
    assert source is not None
    place = Path(source).expanduser()
    if place.suffix in (".yaml", ".yml") or (place.is_file() and place.suffix != ".json"):
        return load_recipe(source, wanted), None
    if place.suffix == ".json" or (place.is_dir() and not any(place.glob("tokenizer*"))):
        return _bare(source, place, wanted)
    return make_recipe(_with({"model": source}, wanted), source, wanted), None


def _bare(name: str, config: Any, changes: dict[str, Any]) -> tuple[Recipe, Any]:
    """Return a recipe for a configuration, in the 16 bits such a base would be trained in, and its empty model."""
    from lorakit.inject.skeleton import config_of, on_meta
    from lorakit.training.recipe import make_recipe

    recipe = make_recipe(_with({"model": name, "train": {"dtype": "bf16"}}, changes), name, changes)
    task = "classification" if recipe.task == "classification" else None
    return recipe, on_meta(config_of(config), task)


def _with(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    from lorakit.training.recipe import changed

    return changed(values, changes)


def _other(name: str, changes: list[str], where: Any) -> tuple[Recipe, Any]:
    from lorakit.cli.train import changes_of
    from lorakit.training.recipe import load_recipe

    return load_recipe(name, changes_of(changes)), where


def _show(out: Screen, found: PlannedRun, values: dict[str, Any], modules: bool, advice: bool) -> None:
    from lorakit.report.plan import EACH, GROUPED, WAYS, each, grouped

    counts, load = found.counts, found.load
    kind = f" packed into {found.quant}" if found.quant else ""
    out.say(
        f"{found.model}: {counts.total_parameters:,} parameters, {found.dtype}{kind}",
        f"trains {counts.trainable_parameters:,} ({counts.percent:.4g} %) by {found.method}; "
        f"the adapter's file is {size(counts.adapter_bytes())}",
        "",
    )
    if modules:
        out.show(table("", *EACH, rows=each(values["modules"]), numbers=(3, 4)))
    else:
        out.show(table("", *GROUPED, rows=grouped(values["modules"]), numbers=(2, 3, 4)))
    for one in counts.whole[:6]:
        out.say(f"  trained whole: {one.name}, {one.parameters:,}")
    if len(counts.whole) > 6:
        out.say(f"  and {len(counts.whole) - 6} more parameters of the base are trained whole")
    _say_data(out, found, values)
    out.say("")
    out.show(_memory(found.memory))
    ways = ", ".join(f"{WAYS[name]} {size(one.step.total)}" for name, one in found.ways.items())
    out.say(f"a step: {ways}")
    if found.where.count > 1:
        needs = ", ".join(f"{fit.device} {size(fit.needed)}" for fit in found.fits[:3])
        out.say(f"on each of {found.where.count} devices under {found.where.strategy}: {needs}")
        if found.where.strategy == "zero3":
            out.say("that is a forecast for other tools: lorakit itself trains with ddp, fsdp and hybrid")
    out.say("")
    _say_fits(out, found, values)
    packed = ", packed" if load.packed else ", not packed" if found.why else ""
    why = f": {found.why}" if found.why else ""
    out.say(
        f"(batches of {load.rows} x {load.length} tokens{packed}{why}; what a device needs itself is counted, 1 GB)"
    )
    _say_advice(out, found, advice)
    for finding in found.findings:
        out.say(f"{finding.tool}: {finding.what}: {finding.why}; {finding.remedy}")
    for warning in found.warnings:
        out.say(f"note: {warning}")


def _say_data(out: Screen, found: PlannedRun, values: dict[str, Any]) -> None:
    from lorakit.report.plan import times
    from lorakit.report.words import operations

    pace = found.pace
    for report in found.data.values():
        out.say("", *report.lines())
    if found.lengths:
        counts = [one["examples"] for one in values["lengths"]]
        middle, ninth = (found.lengths[int(len(found.lengths) * share)] for share in (0.5, 0.9))
        out.say(f"tokens an example: {found.lengths[0]:,} {bars(counts)} {found.lengths[-1]:,}, half up to {middle:,}, "
                f"nine in ten up to {ninth:,}")  # fmt: skip
    if found.example:
        show_example(found.example, sys.stdout)
    work = f"{operations(pace.flops_per_step)} a step"
    if pace.steps is not None and pace.tokens is not None:
        work = f"{pace.steps:,} steps, {pace.tokens:,} tokens; {work}"
    if pace.cache_bytes:
        once = f"{operations(pace.cache_flops)} and " if pace.cache_flops else ""
        work = f"{work}, and once for train.cache_frozen {once}{size(pace.cache_bytes)} on disk"
    out.say("", work, *times(values))


def _memory(forecast: Forecast) -> Any:
    """Draw the phases, a column for each part that any of them has."""
    phases = {name: parts.to_json() for name, parts in forecast.phases.items()}
    parts = [p for p in next(iter(phases.values())) if any(values[p] for values in phases.values())]
    rows = [(name, *(size(values[p]) if values[p] else "" for p in parts)) for name, values in phases.items()]
    return table("", "memory", *parts, rows=rows, numbers=range(1, len(parts) + 1))


def _say_fits(out: Screen, found: PlannedRun, values: dict[str, Any]) -> None:
    """Say one line for each verdict, and for named devices how much is left."""
    from lorakit.report.plan import largest

    several = "" if found.where.count == 1 else f"{found.where.count} x, {found.where.strategy}: "
    if found.where.devices:
        for fit in found.fits:
            left = f"{size(fit.spare)} left" if fit.spare >= 0 else f"{size(-fit.spare)} too much"
            out.say(f"{several}{fit.device} ({fit.limit / 2**30:.1f} GiB): {fit.verdict}, {left}")
        out.say(*largest(values))
        return
    by_verdict: dict[str, list[str]] = {}
    for fit in found.fits:
        by_verdict.setdefault(fit.verdict, []).append(fit.device)
    for verdict, devices in by_verdict.items():
        out.say(f"{several}{verdict}: {', '.join(devices)}")


def _say_advice(out: Screen, found: PlannedRun, in_full: bool) -> None:
    if not found.advice:
        return
    if in_full:
        rows = [(line.topic, line.value, line.reason, line.source) for line in found.advice]
        out.say("")
        out.show(table("", "advice", "", "because", "source", rows=rows))
        return
    lines = ", ".join(f"{line.topic} {line.value}" for line in found.advice)
    out.say("", f"advice (--advice says why): {lines}")


def _say_compared(out: Screen, plans: dict[str, Any]) -> None:
    """Say the plans side by side, and what that comes to."""
    from lorakit.report.plan import COMPARED, compared, verdicts

    out.say("")
    out.show(table("", "compared", *COMPARED[1:], rows=compared(plans), numbers=range(2, 7)))
    out.say(*verdicts(plans))
