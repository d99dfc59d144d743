"""The way from a name to a method and from a module to its host; higher rooms reach both through here.

The folder `methods/` is the registry: a file with one final `Method` in it is all a new method needs.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache

from torch import nn

from lorakit.core.host import Host
from lorakit.core.method import Method
from lorakit.errors import SpecError, did_you_mean


@cache
def methods() -> dict[str, type[Method]]:
    """Return every method by name, in alphabetical order."""
    folder = importlib.import_module("lorakit.methods")
    found: dict[str, type[Method]] = {}
    for info in pkgutil.iter_modules(folder.__path__):
        module = importlib.import_module(f"lorakit.methods.{info.name}")
        for cls in vars(module).values():
            is_method = inspect.isclass(cls) and issubclass(cls, Method) and not inspect.isabstract(cls)
            if is_method and cls.__module__ == module.__name__:
                found[cls.name] = cls
    return dict(sorted(found.items()))


def method(name: str) -> type[Method]:
    """Return the method called `name`, or raise `SpecError` with the nearest names."""
    known = methods()
    if name not in known:
        raise SpecError(f"unknown method {name!r}{did_you_mean(name, known)}; known methods: {', '.join(known)}")
    return known[name]


@cache
def hosts() -> dict[str, Host]:
    """Return every row of the host table by kind."""
    rows: tuple[Host, ...] = importlib.import_module("lorakit.hosts.rows").ROWS
    return {row.kind: row for row in rows}


def host_of(module: nn.Module) -> Host | None:
    """Return the host of a module, or None where no row of the table fits it."""
    return next((row for row in hosts().values() if row.matches(module)), None)
