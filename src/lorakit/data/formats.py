"""What a row can look like: one table of formats, recognised by their columns and checked value by value.

Two formats never compete for the same columns except by containment (`text` in `text + label`), where the more
specific one wins; everything else that is unclear is refused with the columns found and the columns wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorakit.data.readers import Where, kind_of
from lorakit.data.readers import read_rows as read_rows
from lorakit.errors import DataError, did_you_mean, listing

if TYPE_CHECKING:
    from datasets import Dataset

SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
            "chatgpt": "assistant", "tool": "tool", "observation": "tool"}  # fmt: skip
"""ShareGPT's names of who speaks, as chat roles."""


@dataclass(frozen=True)
class Value:
    """What a column must hold: the words that say it, and a function that returns a complaint or None."""

    says: str
    complaint: Callable[[Any], str | None]


@dataclass(frozen=True)
class Format:
    """A shape of rows: the columns it needs and may have, and which of them ask and answer, where columns do."""

    name: str
    needs: Mapping[str, Value]
    may: Mapping[str, Value] = field(default_factory=dict)
    asks: tuple[str, ...] = ()
    answer: str = ""

    def __str__(self) -> str:
        needs = [f"{name} ({value.says})" for name, value in self.needs.items()]
        return f"{self.name}: {', '.join(needs + [f'optional {name}' for name in self.may])}"

    def complaint(self, row: Mapping[str, Any]) -> str | None:
        """Say what is wrong with a row, or None."""
        for name, value in self.needs.items():
            if row.get(name) is None:
                return f"field '{name}' is missing or null, expected {value.says}"
        for name, value in {**self.needs, **self.may}.items():
            if row.get(name) is not None and (what := value.complaint(row[name])):
                return f"field '{name}' {what}"
        if self.asks and not any(row.get(name) for name in (*self.asks, self.answer)):
            return f"'{self.asks[0]}' and '{self.answer}' are both empty, so there is nothing to read or to learn"
        return None


def _of_type(says: str, *types: type) -> Value:
    return Value(says, lambda v: None if isinstance(v, types) else f"is {kind_of(v)}, expected {says}")


def _turns(who: str, what: str, speakers: Mapping[str, str] | None = None) -> Value:
    says = f"a list of {{{who}, {what}}}"

    def complaint(turns: Any) -> str | None:
        if not isinstance(turns, list) or not turns:
            return f"is {kind_of(turns) if turns else 'empty'}, expected {says}"
        for number, turn in enumerate(turns, 1):
            missing = [key for key in (who, what) if not isinstance(turn, dict) or not isinstance(turn.get(key), str)]
            if isinstance(turn, dict) and turn.get("tool_calls"):  # such a turn may say nothing
                missing = [key for key in missing if key != what]
            if missing:
                return f"turn {number}: '{missing[0]}' is not a string, expected {says}"
            if speakers and turn[who] not in speakers:
                return f"turn {number}: unknown speaker '{turn[who]}', expected one of {', '.join(speakers)}"
        return None

    return Value(says, complaint)


def _label(value: Any) -> str | None:
    """Say what is wrong with a label; among a column's NaN its integers are floats."""
    if isinstance(value, str | int) or (isinstance(value, float) and value.is_integer()):
        return None
    return f"is {value if isinstance(value, float) else kind_of(value)}, expected a string or an integer"


_STRING = _of_type("a string", str)
_LABEL = Value("a string or an integer", _label)

FORMATS = {
    form.name: form
    for form in (
        Format("text", {"text": _STRING}),
        Format("prompt+completion", {"prompt": _STRING, "completion": _STRING}, asks=("prompt",), answer="completion"),
        Format("messages", {"messages": _turns("role", "content")}),
        Format("alpaca", {"instruction": _STRING, "output": _STRING}, {"input": _STRING},
               asks=("instruction", "input"), answer="output"),
        Format("sharegpt", {"conversations": _turns("from", "value", SPEAKERS)}),
        Format("classification", {"text": _STRING, "label": _LABEL},
               {"text_pair": _STRING}),
    )
}  # fmt: skip


def detect(rows: Dataset) -> Format:
    """Recognise the format of the rows by their columns, or raise `DataError` with what each format needs."""
    columns = set(rows.column_names)
    fits = [form for form in FORMATS.values() if form.needs.keys() <= columns]
    best = [form for form in fits if not any(form.needs.keys() < other.needs.keys() for other in fits)]
    if len(best) == 1:
        return best[0]
    names = " and ".join(f"'{form.name}'" for form in best)
    problem = f"the rows fit {names}; choose one with `format`" if best else "the rows fit no known format"
    raise DataError(f"{problem}\n{_columns_and_needs(columns)}")


def named(name: str, rows: Dataset) -> Format:
    """Return the format called `name` after checking that the rows have its columns; `auto` detects it."""
    if name == "auto":
        return detect(rows)
    if name not in FORMATS:
        raise DataError(f"unknown format '{name}', expected auto, {', '.join(FORMATS)}{did_you_mean(name, FORMATS)}")
    missing = sorted(FORMATS[name].needs.keys() - set(rows.column_names))
    if missing:
        raise DataError(f"format '{name}' needs the columns {missing}\n{_columns_and_needs(set(rows.column_names))}")
    return FORMATS[name]


def check(rows: Dataset, form: Format, where: Where) -> None:
    """Raise `DataError` naming place and fault of every row whose fields are missing, null or of a wrong type."""
    columns = [name for name in rows.column_names if name in {**form.needs, **form.may}]
    faults = {i: what for i, row in enumerate(rows.select_columns(columns)) if (what := form.complaint(row))}
    if faults:
        raise DataError(f"rows that are not of the format '{form.name}':\n{at_rows(faults, where)}")


def at_rows(faults: Mapping[int, str], where: Where, limit: int = 12) -> str:
    """List faults with the places of their rows, looking up no more places than one screen shows."""
    shown = list(faults)[:limit]
    lines = [f"{place}: {faults[row]}" for place, row in zip(where(shown), shown, strict=True)]
    return listing(lines + [""] * (len(faults) - len(shown)), limit)


def _columns_and_needs(columns: set[str]) -> str:
    known = {name for form in FORMATS.values() for name in {**form.needs, **form.may}}
    found = [f"'{name}'{did_you_mean(name, known) if name not in known else ''}" for name in sorted(columns)]
    return f"columns found:\n{listing(found)}\nformats:\n{listing([str(form) for form in FORMATS.values()])}"
