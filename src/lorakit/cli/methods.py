"""`lorakit methods`: every update method and initialisation there is, as each says of itself."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.screen import Screen, screen, table

if TYPE_CHECKING:
    from lorakit.core.init import Init
    from lorakit.core.method import Method


def methods(
    name: Annotated[str | None, typer.Argument(help="One method or initialisation, in full.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the update methods, or explain one."""
    with screen(json) as out:
        from lorakit.core.registry import inits
        from lorakit.core.registry import methods as known
        from lorakit.errors import SpecError, did_you_mean

        described = [describe(cls) for cls in known().values()]
        starts = [describe_init(cls) for cls in inits().values()]
        if name is None:
            _list(out, described, starts)
            out.result({"methods": described, "inits": starts})
            return
        found = next((one for one in (*described, *starts) if one["name"] == name), None)
        if found is None:
            names = [one["name"] for one in (*described, *starts)]
            raise SpecError(f"unknown method {name!r}{did_you_mean(name, names)}; lorakit methods lists them all")
        _explain(out, found)
        out.result(found)


def describe(cls: type[Method]) -> dict[str, Any]:
    """Return what a method says of itself, as plain values."""
    from lorakit.core.method import LowRank, Static

    return {
        "name": cls.name,
        "what": _first_line(cls),
        "formula": cls.formula,
        "parameters": cls.count,
        "kinds": sorted(cls.kinds),
        "mergeable": issubclass(cls, Static),
        "servable": issubclass(cls, LowRank),
        "peft": cls.peft and cls.peft.type,
        "paper": cls.paper,
        "fields": _fields(cls),
    }


def describe_init(cls: type[Init]) -> dict[str, Any]:
    """Return what an initialisation says of itself, as plain values."""
    return {
        "name": cls.name,
        "what": _first_line(cls),
        "starts_at_zero": cls.starts_at_zero,
        "needs": cls.needs,
        "paper": cls.paper,
        "fields": _fields(cls),
    }


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _fields(cls: Any) -> dict[str, Any]:
    """Return the fields with their defaults as a recipe names them; one without a default has to be given."""
    from lorakit.core.spec import fields_of

    return {name: _plain(field.default) for name, field in fields_of(cls).items()}


def _plain(default: Any) -> Any:
    from lorakit.core.spec import method_to_json

    if default is dataclasses.MISSING:
        return None
    return method_to_json(default) if dataclasses.is_dataclass(default) else default  # type: ignore[arg-type]


def _list(out: Screen, methods: list[dict[str, Any]], inits: list[dict[str, Any]]) -> None:
    rows = [(m["name"], m["formula"], m["parameters"], _yes(m["mergeable"]), m["peft"] or "") for m in methods]
    out.show(table("methods", "name", "update", "parameters at (m, n)", "merges", "PEFT", rows=rows))
    out.say("")
    starts = [(i["name"], i["what"], i["needs"] or "") for i in inits]
    out.show(table("initialisations of LoRA", "name", "where the pair starts", "measures first", rows=starts))
    out.say(
        "", "without a method: `method: none` trains what `train` names, for example `biases`, `norms`, `heads` or `*`"
    )
    out.say("one in full: lorakit methods NAME")


def _explain(out: Screen, one: dict[str, Any]) -> None:
    words = {key: value for key, value in one.items() if key not in ("name", "what", "fields")}
    out.say(f"{one['name']}: {one['what']}", "")
    for key, value in words.items():
        shown = ", ".join(value) if isinstance(value, list) else _yes(value) if isinstance(value, bool) else value
        out.say(f"{key.replace('_', ' '):<15} {shown if shown is not None else 'none'}")
    out.say("", "fields and defaults")
    for key, value in one["fields"].items():
        out.say(f"  {key:<13} {value}")


def _yes(value: bool) -> str:
    return "yes" if value else "no"
