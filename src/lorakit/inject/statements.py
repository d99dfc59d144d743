"""What a module computes, read from its source: a forward's statements as text, and whose weights it reads itself."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from types import CodeType
from typing import Any

from torch import nn

_MAKES = re.compile(r"__init__|_*(init|reset|tie|get|set|load|save|resize|prune)_")
"""Functions that make, tie or change a model, and compute nothing."""
_ASKS = frozenset(
    "dtype device shape ndim size dim numel element_size is_cuda is_meta requires_grad _is_hf_initialized".split()
)
"""What may be asked of a weight without reading a value."""
_ASKING = frozenset({"hasattr", "getattr", "setattr", "isinstance", "id", "type"})


@cache
def statements(function: Any, *names: str) -> str:
    """Return the statements of a function whose arguments are called by these names, without comments.

    "" for a function of another number of arguments, `self` and `**kwargs` left out, or without a source.
    """
    definition = _definition(function)
    if definition is None or len(definition.args.args) != 1 + len(names):
        return ""
    given = [argument.arg for argument in definition.args.args[1:]]
    called = dict(zip(given, names, strict=True))
    for node in ast.walk(definition):
        if isinstance(node, ast.Name):
            node.id = called.get(node.id, node.id)
    body = [s for s in definition.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    return "\n".join(map(ast.unparse, body))


@cache
def weights_read(cls: Any) -> frozenset[str]:
    """Return the layers inside a module of this class whose `weight` it reads past their forward, by their paths.

    An adapter on such a layer is called by no one. A class without a source reads none, as far as anyone can tell.
    """
    functions: dict[str, Any] = {}
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, found in vars(base).items():
            functions.setdefault(
                name, inspect.unwrap(getattr(found, "fget", None) or getattr(found, "__func__", found))
            )
    computing = [f for name, f in functions.items() if inspect.isfunction(f) and not _MAKES.match(name)]
    return frozenset(path for f in computing if "weight" in _names(f.__code__) for path in _weights_in(_definition(f)))


def _definition(function: Any) -> ast.FunctionDef | None:
    try:
        found = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    return found if isinstance(found, ast.FunctionDef) else None


def _names(code: CodeType) -> set[str]:
    """Return the attributes a function's code asks for, those of functions inside it included."""
    inside = [part for part in code.co_consts if isinstance(part, CodeType)]
    return {*code.co_names, *(name for part in inside for name in _names(part))}


def _weights_in(definition: ast.FunctionDef | None) -> Iterator[str]:
    """Yield `a.b` of each `self.a.b.weight` that is read for its values."""
    if definition is None:
        return
    asked = {id(part) for node in ast.walk(definition) for part in _asked(node)}
    for node in ast.walk(definition):
        if isinstance(node, ast.Attribute) and node.attr == "weight" and id(node) not in asked:
            path = re.fullmatch(r"self\.([\w.]+)\.weight", ast.unparse(node))
            if path and isinstance(node.ctx, ast.Load):
                yield path[1]


def _asked(node: ast.AST) -> list[ast.AST]:
    """Return what stands below a node and is not read there for its values."""
    if isinstance(node, ast.Attribute) and node.attr in _ASKS:
        return [node.value]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ASKING:
        return list(node.args)
    if isinstance(node, ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
        return [node.left]
    if isinstance(node, ast.Assign) and any(isinstance(target, ast.Attribute) for target in node.targets):
        return [node.value]  # one weight made another's
    if isinstance(node, ast.If) and "pretraining_tp" in ast.unparse(node.test):
        return [part for line in node.body for part in ast.walk(line)]  # how a base was trained on several devices
    return []
