"""What a forward computes, read from its source: its statements as text, to be compared with ones that are known."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from typing import Any


@cache
def statements(function: Any, *names: str) -> str:
    """Return the statements of a function whose arguments are called by these names, without comments.

    "" for a function of another number of arguments, `self` and `**kwargs` left out, or without a source.
    """
    try:
        definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return ""
    if not isinstance(definition, ast.FunctionDef) or len(definition.args.args) != 1 + len(names):
        return ""
    given = [argument.arg for argument in definition.args.args[1:]]
    called = dict(zip(given, names, strict=True))
    for node in ast.walk(definition):
        if isinstance(node, ast.Name):
            node.id = called.get(node.id, node.id)
    body = [s for s in definition.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    return "\n".join(map(ast.unparse, body))
