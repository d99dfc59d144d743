"""JSON from a file nobody vouches for: whatever is wrong with it is one kind of error that says what, and where.

The standard reader raises four unrelated exceptions: for syntax, for bytes that are not UTF-8, for an integer of more
than 4,300 digits, and for brackets nested deeper than its stack.
"""

from __future__ import annotations

import json
from typing import Any

DEEPEST = 100
"""Levels of brackets that any reader of ours follows; no row, recipe or configuration has more than ten."""


class JsonFault(ValueError):
    """What is wrong with a JSON text: `what` in words; `line` and `column` from 1, `offset` from 0, where known."""

    def __init__(self, what: str, line: int | None = None, column: int | None = None, offset: int = 0) -> None:
        self.what, self.line, self.column, self.offset = what, line, column, offset
        super().__init__(what if line is None else f"{what} at line {line} column {column}")


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        JsonFault: malformed, not UTF-8, an integer too long to read, or brackets nested too deeply.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise JsonFault(error.msg.removesuffix(" at"), error.lineno, error.colno, error.pos) from None
    except UnicodeDecodeError as error:
        raise JsonFault(f"not UTF-8 text (byte {error.start}), convert it to UTF-8") from None
    except RecursionError:
        raise JsonFault("brackets nested too deeply") from None
    except ValueError:
        raise JsonFault("an integer of more than 4,300 digits") from None
    if too_deep(value):
        raise JsonFault(f"brackets nested more than {DEEPEST} deep")
    return value


def too_deep(value: Any, most: int = DEEPEST) -> bool:
    """Return whether lists and mappings are nested more than `most` levels deep."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(most):
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)
                 if isinstance(inner, (dict, list))]  # fmt: skip
        if not level:
            return False
    return True
