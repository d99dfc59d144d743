"""What is wrong with a recipe, in the user's words: one line a key: what was expected, given, and near.

The validator complains once for every reading of a value it tried, in the language of types; here its complaints are
gathered by the key they are about.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from lorakit.errors import did_you_mean, shown

_EXPECTED: dict[str, str] = {
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "a whole number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "a section of keys"),
    **dict.fromkeys(("tuple_type", "list_type"), "a list"),
    "string_type": "a word",
    "invalid_key": "a word as the key",
    "missing": "a value",
    "finite_number": "a finite number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
}


def explain(
    error: ValidationError,
    values: Mapping[str, Any],
    sections: Mapping[str, type[BaseModel]],
    changes: Collection[str] = (),
) -> list[str]:
    """Return one line for each key that is wrong.

    Args:
        error: of the validator.
        values: what was validated.
        sections: the models by the name of their section, the whole recipe's under "".
        changes: dotted keys that came from the command line, which their lines say.
    """
    by_key: dict[str, list[Any]] = {}
    for one in error.errors():
        by_key.setdefault(".".join(_key(one["loc"], values, one["type"])), []).append(one)
    lines = []
    for key, complaints in by_key.items():
        for place, what in _lines(key, complaints, sections):
            said = " (from --output or --set)" if place == "output" and place in changes else " (from --set)"
            lines.append(f"{place}: {what}" + (said if _is_from(place, changes) else ""))
    return lines


def _key(loc: tuple[int | str, ...], values: Any, kind: str) -> list[str]:
    """Return the steps of a location that are keys of the recipe; the rest name the reading that was tried."""
    key: list[str] = []
    for step in loc:
        listed = isinstance(values, list | tuple) and isinstance(step, int) and step < len(values)
        if listed or (isinstance(values, Mapping) and step in values):
            values = values[step]
        elif not (kind == "missing" and step == loc[-1]):
            break
        key.append(str(step))
    return key


def _lines(key: str, complaints: list[Any], sections: Mapping[str, type[BaseModel]]) -> list[tuple[str, str]]:
    """Return key and words of every problem the complaints about one key tell."""
    first = complaints[0]
    if first["type"] == "extra_forbidden":
        return [(key, _unknown(key, sections))]
    own = [one for one in complaints if one["type"] in ("value_error", "assertion_error")]
    if own:
        told = [line for one in own for line in str(one["msg"]).removeprefix("Value error, ").splitlines()]
        return [_placed(key, line, own[0].get("input")) for line in told]
    expected = dict.fromkeys(words for one in complaints if (words := _expected(one)))
    known = [word for one in complaints if one["type"] == "literal_error" for word in _choices(one)]
    given = first.get("input")
    hint = did_you_mean(given, known) if isinstance(given, str) else ""
    if isinstance(given, list | tuple) and list(expected) == ["a word"]:
        expected = {"a list of words": None}
    if first["type"] == "missing":
        return [(key, "is missing")]
    return [(key, f"expected {' or '.join(expected)}, given {'nothing' if given is None else shown(given)}{hint}")]


def _placed(key: str, line: str, given: Any) -> tuple[str, str]:
    """Return where a validator's own words belong: `rank: must be ...` under adapter is adapter.rank."""
    if found := re.match(r"([\w.\[\]]+): (.*)", line):
        return f"{key}.{found[1]}", found[2]
    value = "" if isinstance(given, Mapping | BaseModel) or given is None else f", given {shown(given)}"
    return key or "the recipe", f"{line}{value}"


def _unknown(key: str, sections: Mapping[str, type[BaseModel]]) -> str:
    *above, last = key.split(".")
    if "overrides" in above:
        return f"unknown key; an override has targets, layers and fields: write fields: {{{last}: ...}}"
    section = sections.get(above[0], sections[""]) if above else sections[""]
    known = list(section.model_fields)
    elsewhere = [f"{name}.{last}" for name, one in sections.items() if name and last in one.model_fields]
    hint = did_you_mean(last, known) or (f"; did you mean {elsewhere[0]}?" if elsewhere else "")
    return f"unknown key{hint or '; known keys: ' + ', '.join(known)}"


def _expected(one: Any) -> str:
    if one["type"] == "literal_error":
        *others, last = _choices(one)
        return f"{', '.join(others)} or {last}" if others else last
    return _EXPECTED.get(one["type"], str(one["msg"])).format(**one.get("ctx", {}))


def _choices(one: Any) -> list[str]:
    return re.findall(r"'([^']*)'", one["ctx"]["expected"]) or [one["ctx"]["expected"]]


def _is_from(place: str, changes: Collection[str]) -> bool:
    return any(place == change or change.startswith(f"{place}.") for change in changes)
