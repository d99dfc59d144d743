"""YAML as people write recipes: `1e-4` is a number, a key that stands twice a mistake, and every fault is one error."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from lorakit.core.jsontext import DEEPEST, too_deep
from lorakit.errors import RecipeError

_SLICE = re.compile(r"[\[{,][^\"'\n]*[\w*]\[[\w:, ]+\]")
"""A name with rows of it, without quotes inside a list or a mapping on one line."""


class _Loader(yaml.SafeLoader):
    """The safe loader with two changes: exponents without a point, and no key twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose one mapping, or raise `RecipeError` naming the key and both lines; merged keys (`<<`) come later."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise RecipeError(f"line {line}: {key.value!r} stands in line {lines[key.value]} already; keep one")
            lines[key.value] = line
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text; an empty one is None.

    Raises:
        RecipeError: `line N: ...` or `is not YAML: ...`, for whoever knows the name of the file to complete.
    """
    try:
        value = yaml.load(text, _Loader)
    except RecipeError:
        raise
    except yaml.MarkedYAMLError as error:
        mark, hint = error.problem_mark or error.context_mark, ""
        if _SLICE.search(text):
            hint = '; put a name with [...] inside a list in quotes: ["c_attn[q,v]", q_proj]'
        where = "" if mark is None else f" in line {mark.line + 1} column {mark.column + 1}"
        raise RecipeError(f"is not YAML: {error.problem or error.context}{where}{hint}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"is not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise RecipeError("is nested too deeply") from None
    except ValueError as error:  # of a number or a date: a month 13, an integer of more than 4,300 digits
        what = "an integer of more than 4,300 digits" if "digits" in str(error) else str(error)
        raise RecipeError(f"is not YAML: {what}") from None
    try:
        json.dumps(value, ensure_ascii=False, skipkeys=True, default=str).encode()
    except UnicodeEncodeError:
        raise RecipeError("holds half a character (a lone surrogate such as \\ud800); write the whole one") from None
    except ValueError:  # a list inside itself
        raise RecipeError("holds something inside itself (an alias to its own anchor)") from None
    if too_deep(value):
        raise RecipeError(f"is nested more than {DEEPEST} deep")
    return value
