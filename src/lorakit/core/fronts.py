"""Put a mixin in front of the class of a live module, and take it away again.

The swap `attach` rests on (docs/adr/0001). A module may carry several fronts at once, put on and taken off in any
order; copies and pickles keep them, because they are written by the base class, which has an importable name.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn


class Front:
    """What stands in front of a module's class: a forward of its own, which calls the next one."""

    outer = False
    """Whether it stands before the fronts that are there; the others stand behind them."""
    renames = True
    """Whether the class says in its name that it is adapted."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and copy by the base class: the class with fronts is made on demand and has no importable name."""
        module = cast(nn.Module, self)
        return _revive, (base_class(module), fronts(module)), self.__dict__.copy()


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_classes: dict[tuple[type[nn.Module], tuple[type[Front], ...]], type[nn.Module]] = {}
_PARTS = "_lorakit_parts"


def fronted_class(base: type[nn.Module], *mixins: type[Front]) -> type[nn.Module]:
    """Return `base` with mixins in front; one class per base and fronts, so compiled graphs are shared.

    Transformers looks up what a model records by the name of its class, so a model and its blocks keep theirs.
    """
    key = (base, mixins)
    if key not in _classes:
        says_so = all(mixin.renames for mixin in mixins)
        name, qualname = (f"Adapted{base.__name__}",) * 2 if says_so else (base.__name__, base.__qualname__)
        place = __name__ if says_so else base.__module__
        _classes[key] = type(name, (*mixins, base), {"__module__": place, "__qualname__": qualname, _PARTS: key})
    return _classes[key]


def base_class(module: nn.Module) -> type[nn.Module]:
    """Return the class a module has, or had before anything was put in front."""
    parts: Any = getattr(type(module), _PARTS, None)
    return type(module) if parts is None else parts[0]


def fronts(module: nn.Module) -> tuple[type[Front], ...]:
    """Return the mixins in front of a module's class, the outermost first."""
    parts: Any = getattr(type(module), _PARTS, None)
    return () if parts is None else parts[1]


def is_watched(module: nn.Module) -> bool:
    """Return whether somebody hung a hook on a module, which a call past its own would leave out."""
    return any(getattr(module, hooks) for hooks in _HOOKS)


def put_in_front(module: nn.Module, mixin: type[Front]) -> None:
    """Put `mixin` in front of the class of `module`, unless it is there."""
    there = fronts(module)
    if mixin not in there:
        now = (mixin, *there) if mixin.outer else (*there, mixin)
        module.__class__ = fronted_class(base_class(module), *now)


def take_from_front(module: nn.Module, mixin: type[Front]) -> None:
    """Take `mixin` away again: the inverse of `put_in_front`."""
    base, left = base_class(module), tuple(front for front in fronts(module) if front is not mixin)
    module.__class__ = fronted_class(base, *left) if left else base


def _revive(base: type[nn.Module], mixins: tuple[type[Front], ...]) -> nn.Module:
    cls = fronted_class(base, *mixins)
    return cls.__new__(cls)
