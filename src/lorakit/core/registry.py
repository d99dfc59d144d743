"""The way from a name to a method and from a module to its host; higher rooms reach both through here.

The folders are the registry: a file with one final `Method` in `methods/` or `context/`, or with one final `Init` in
`inits/`, is all a new one needs. A method that lives elsewhere enters by `register`, or, for every process, by an entry
point of its package in the group `lorakit.methods`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from torch import nn

from lorakit.core.host import Host
from lorakit.core.init import Init
from lorakit.core.method import Method
from lorakit.core.site import Site
from lorakit.errors import SpecError, did_you_mean

GROUP = "lorakit.methods"
"""The entry points of installed packages that name a method each."""
_WORDS = ("name", "paper", "formula", "count")

M = TypeVar("M", bound=Method)
_registered: dict[str, type[Method]] = {}


def methods() -> dict[str, type[Method]]:
    """Return every method by name, in alphabetical order: lorakit's own, installed ones and registered ones."""
    _load_installed()
    return dict(sorted({**_own(), **_registered}.items()))


def register(cls: type[M]) -> type[M]:
    """Make a method of your own known by its name, to recipes and adapter files in this process; returns it.

    Usable as a decorator, above `@dataclass(frozen=True)`. The same class may come again, as it does in a notebook, or
    from a file that is run as a script and imported as well.

    Raises:
        SpecError: no final method, one that does not say what it is, or a name another method has.
    """
    if not (inspect.isclass(cls) and issubclass(cls, Method)) or inspect.isabstract(cls):
        raise SpecError(f"{cls!r} is no method that could be used; write what its rung leaves open")
    if "__dataclass_fields__" not in vars(cls):
        raise SpecError(f"{cls.__name__} is no dataclass; write @dataclass(frozen=True) between it and @register")
    if unsaid := [word for word in _WORDS if not isinstance(getattr(cls, word, None), str)]:
        raise SpecError(f"{cls.__name__} does not say its {', '.join(unsaid)}; add each as a ClassVar[str]")
    other = {**_own(), **_registered}.get(cls.name, cls)
    if other.__qualname__ != cls.__qualname__ or len({other.__module__, cls.__module__} - {"__main__"}) > 1:
        raise SpecError(
            f"{cls.__name__} cannot be called {cls.name!r}: {other.__module__}.{other.__qualname__} is; rename it"
        )
    _registered[cls.name] = cls
    return cls


@cache
def inits() -> dict[str, type[Init]]:
    """Return every initialisation by name, in alphabetical order."""
    return dict(_found("lorakit.inits", Init))


def method(name: str) -> type[Method]:
    """Return the method called `name`, or raise `SpecError` with the nearest names."""
    found: type[Method] = _own()[name] if name in _own() else _named("method", name, methods())
    return found


def init(name: str) -> type[Init]:
    """Return the initialisation called `name`, or raise `SpecError` with the nearest names."""
    found: type[Init] = _named("initialisation", name, inits())
    return found


@cache
def _own() -> dict[str, type[Method]]:
    return dict([*_found("lorakit.methods", Method), *_found("lorakit.context", Method)])


@cache
def _load_installed() -> None:
    """Register the methods of installed packages; a package that cannot be imported is named."""
    for point in importlib.metadata.entry_points(group=GROUP):
        try:
            register(point.load())
        except Exception as error:
            package = point.dist.name if point.dist else "its package"
            raise SpecError(
                f"the method {point.name!r} of {package} ({point.value}) cannot be used: {error}; "
                f"mend {package} or uninstall it"
            ) from error


def _named(what: str, name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise SpecError(f"unknown {what} {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    return known[name]


def _found(room: str, base: Any) -> list[tuple[str, Any]]:
    """Return the subclasses of `base` in a room that have a name; one without is what others share."""
    folder = importlib.import_module(room)
    found = []
    for info in pkgutil.iter_modules(folder.__path__):
        module = importlib.import_module(f"{room}.{info.name}")
        for cls in vars(module).values():
            is_named = inspect.isclass(cls) and issubclass(cls, base) and hasattr(cls, "name")
            if is_named and cls.__module__ == module.__name__:
                found.append((cls.name, cls))
    return sorted(found, key=lambda pair: pair[0])


@cache
def hosts() -> dict[str, Host]:
    """Return every row of the host table by name."""
    rows: tuple[Host, ...] = importlib.import_module("lorakit.hosts.rows").ROWS
    return {row.name: row for row in rows}


def host_of(module: nn.Module) -> Host | None:
    """Return the host of a module, or None where no row of the table fits it."""
    return next((row for row in hosts().values() if row.matches(module)), None)


def host_at(site: Site, module: nn.Module) -> Host:
    """Return the row of the layer at a site; a whole module or model is one because a target named it so."""
    found = host_of(module)
    return hosts()[site.kind] if found is None or found.kind != site.kind else found
