"""The way from a name to a method and from a module to its host; higher rooms reach both through here.

The folders are the registry: a file with one final `Method` in `methods/` or `context/`, or with one final `Init` in
`inits/`, is all a new one needs.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn

from lorakit.core.host import Host
from lorakit.core.init import Init
from lorakit.core.method import Method
from lorakit.errors import SpecError, did_you_mean


@cache
def methods() -> dict[str, type[Method]]:
    """Return every method by name, in alphabetical order."""
    return dict(sorted([*_found("lorakit.methods", Method), *_found("lorakit.context", Method)]))


@cache
def inits() -> dict[str, type[Init]]:
    """Return every initialisation by name, in alphabetical order."""
    return dict(_found("lorakit.inits", Init))


def method(name: str) -> type[Method]:
    """Return the method called `name`, or raise `SpecError` with the nearest names."""
    found: type[Method] = _named("method", name, methods())
    return found


def init(name: str) -> type[Init]:
    """Return the initialisation called `name`, or raise `SpecError` with the nearest names."""
    found: type[Init] = _named("initialisation", name, inits())
    return found


def _named(what: str, name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise SpecError(f"unknown {what} {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    return known[name]


def _found(room: str, base: Any) -> list[tuple[str, Any]]:
    """Return the final subclasses of `base` in a room, by name."""
    folder = importlib.import_module(room)
    found = []
    for info in pkgutil.iter_modules(folder.__path__):
        module = importlib.import_module(f"{room}.{info.name}")
        for cls in vars(module).values():
            is_final = inspect.isclass(cls) and issubclass(cls, base) and not inspect.isabstract(cls)
            if is_final and cls.__module__ == module.__name__:
                found.append((cls.name, cls))
    return sorted(found, key=lambda pair: pair[0])


@cache
def hosts() -> dict[str, Host]:
    """Return every row of the host table by kind."""
    rows: tuple[Host, ...] = importlib.import_module("lorakit.hosts.rows").ROWS
    return {row.kind: row for row in rows}


def host_of(module: nn.Module) -> Host | None:
    """Return the host of a module, or None where no row of the table fits it."""
    return next((row for row in hosts().values() if row.matches(module)), None)
