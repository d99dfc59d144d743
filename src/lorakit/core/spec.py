"""What to train, as a value: a method, where it goes, and what else moves.

A spec is frozen, validated when made, equal by value, and JSON both ways; the recipe's `adapter:` section becomes one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lorakit.core.checks import check_whole, is_number
from lorakit.core.init import Init
from lorakit.core.method import Method
from lorakit.core.registry import init as init_named
from lorakit.core.registry import method as method_named
from lorakit.errors import SpecError, did_you_mean

VERSION = 1


@dataclass(frozen=True)
class Targets:
    """Which sites: patterns to include, patterns to leave out, and the layers to stay in (see docs/targets.md)."""

    include: Sequence[str] = ("all-linear",)
    exclude: Sequence[str] = ()
    layers: str | None = None

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            listed = _words(getattr(self, name))
            object.__setattr__(self, name, listed)
            if bad := [p for p in listed if not isinstance(p, str) or not p.strip()]:
                raise SpecError(f"targets must be non-empty names or patterns, not {bad[0]!r}")
        if not self.include:
            raise SpecError("targets is empty; name at least one pattern, for example all-linear")
        if not isinstance(self.layers, str | None):
            raise SpecError(f"layers must be text such as '4-7', '0,2' or 'top:2', not {self.layers!r}")

    def without_layers(self) -> Targets:
        """Return the same targets in all layers."""
        return replace(self, layers=None)


@dataclass(frozen=True)
class Override:
    """Other values of the method's fields, at the sites that `targets` select; the last that matches wins."""

    targets: Targets
    fields: tuple[tuple[str, Any], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", tuple((name, _field(name, value)) for name, value in self.fields))

    @classmethod
    def of(cls, pattern: Sequence[str] = "*", *, layers: str | None = None, **fields: Any) -> Override:
        """Return the override of `fields` (`rank=8, alpha=16`) at `pattern`, within `layers`."""
        return cls(Targets(pattern, (), layers), tuple(sorted(fields.items())))


@dataclass(frozen=True)
class AdapterSpec:
    """A whole adapter: the method, its sites, its exceptions, what of the base is trained beside it, and its seed.

    Without a method, what `train` names is all that moves: full fine-tuning, biases alone, a head.
    """

    method: Method | None
    targets: Targets = field(default_factory=Targets)
    train: Sequence[str] = ()
    dropout: float = 0.0
    overrides: Sequence[Override] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method is None and not self.train:
            raise SpecError("without a method nothing would be trained; name a method, or what of the base to train")
        if self.method is None and isinstance(self.targets, Targets) and self.targets.without_layers() != Targets():
            raise SpecError("without a method targets and exclude mean nothing; name in `train` what shall be trained")
        if not (self.method is None or isinstance(self.method, Method)):
            raise SpecError(f"method must be a lorakit method such as LoRA(rank=16), not {self.method!r}")
        if not isinstance(self.targets, Targets):
            raise SpecError(f"targets must be Targets({self.targets!r}), not {self.targets!r} alone")
        if not (is_number(self.dropout) and 0 <= self.dropout < 1):
            raise SpecError(f"dropout must be at least 0 and below 1, not {self.dropout!r}")
        check_whole("seed", self.seed, 0)
        object.__setattr__(self, "train", _words(self.train))
        object.__setattr__(self, "overrides", tuple(self.overrides))
        methods = [self.method, *map(self.method_with, self.overrides)]
        if self.dropout and not any(method is not None and method.drops for method in methods):
            raise SpecError("dropout thins the input of an update, and nothing here computes from it; remove dropout")

    @property
    def name(self) -> str:
        """Return the method's name, or "none" where parts of the base are trained and nothing else."""
        return "none" if self.method is None else self.method.name

    def method_with(self, override: Override) -> Method:
        """Return the method with an override's fields, or raise `SpecError` naming the field it has not."""
        if self.method is None:
            raise SpecError("an override changes fields of the method, and there is none")
        try:
            return with_fields(self.method, dict(override.fields))
        except SpecError as error:
            raise SpecError(f"override of {'/'.join(override.targets.include)}: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON-ready values, with a format version."""
        return {
            "version": VERSION,
            "method": self.method and method_to_json(self.method),
            "targets": _targets_to_json(self.targets),
            "train": list(self.train),
            "dropout": self.dropout,
            "overrides": [
                {"targets": _targets_to_json(o.targets), "fields": {k: _plain(v) for k, v in o.fields}}
                for o in self.overrides
            ],
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> AdapterSpec:
        """Return the spec `to_json` wrote; raises `SpecError` for another version."""
        if data.get("version") != VERSION:
            raise SpecError(
                f"adapter spec has version {data.get('version')!r}, this lorakit reads {VERSION}; upgrade it"
            )
        return cls(
            method=data["method"] and method_from_json(data["method"]),
            targets=_targets_from_json(data["targets"]),
            train=tuple(data["train"]),
            dropout=data["dropout"],
            overrides=tuple(
                Override(_targets_from_json(o["targets"]), tuple(sorted(o["fields"].items())))
                for o in data["overrides"]
            ),
            seed=data["seed"],
        )


def fields_of(method: Method | Init | type[Method | Init]) -> dict[str, dataclasses.Field[Any]]:
    """Return the fields of a method or an initialisation, by the name files give them: Python's `init_` is `init`."""
    return {f.name.rstrip("_"): f for f in dataclasses.fields(method)}


def method_to_json(method: Method | Init) -> dict[str, Any]:
    """Return `{"name": ..., **fields}`, where a field may be a method or an initialisation itself."""
    return {"name": method.name, **{k: _plain(getattr(method, f.name)) for k, f in fields_of(method).items()}}


def method_from_json(data: dict[str, Any]) -> Method:
    """Return the method of `{"name": ..., **fields}`, or raise `SpecError` with the nearest name or field.

    A field that holds a method or an initialisation takes its name alone, or its name with fields. What a method that
    wraps another (`inner`) does not know goes to the one inside, so `{"name": "dora", "rank": 8}` says enough.
    """
    fields = dict(data)
    cls = method_named(fields.pop("name"))
    known = fields_of(cls)
    if "inner" in known:
        usual = known["inner"].default
        passed = {name: fields.pop(name) for name in list(fields) if name not in known}
        given = fields.get("inner", usual)
        inner = {"name": usual.name, **given} if isinstance(given, dict) else given
        fields["inner"] = with_fields(_field("inner", inner), passed)
    _refuse_unknown("method", cls, fields)
    made: Method = cls(**{known[name].name: _field(name, value) for name, value in fields.items()})
    return made


def with_fields(method: Method, changes: Mapping[str, Any]) -> Method:
    """Return a method with other values of some fields, or raise `SpecError` with the nearest field.

    What a method that wraps another does not know goes to the one inside.
    """
    known = fields_of(method)
    own = {name: value for name, value in changes.items() if name in known}
    passed = {name: value for name, value in changes.items() if name not in known}
    if passed and "inner" in known:
        own["inner"] = with_fields(_field("inner", own.get("inner", vars(method)["inner"])), passed)
    else:
        _refuse_unknown("method", type(method), passed)
    changed: Method = replace(method, **{known[name].name: _field(name, value) for name, value in own.items()})
    return changed


def _init_from_json(given: dict[str, Any]) -> Init:
    """Return the initialisation of `{"name": ..., **fields}`, or raise `SpecError` with the nearest name or field."""
    fields = dict(given)
    if "name" not in fields:
        raise SpecError(f"init {given!r} names none; write init: pissa, or init: {{name: pissa, iterations: 16}}")
    cls = init_named(fields.pop("name"))
    _refuse_unknown("init", cls, fields)
    try:
        return cls(**fields)
    except SpecError as error:
        raise SpecError(f"init {cls.name}: {error}") from error


def _refuse_unknown(what: str, cls: type[Method | Init], given: dict[str, Any]) -> None:
    known = fields_of(cls)
    if unknown := [name for name in given if name not in known]:
        raise SpecError(
            f"{what} {cls.name} has no field {unknown[0]!r}{did_you_mean(unknown[0], known)}; "
            f"its fields: {', '.join(known) or 'none'}"
        )


def _field(name: str, value: Any) -> Any:
    """Return the value of a field: an initialisation by name or in full, a list as a tuple, anything else as it is."""
    if name == "init" and isinstance(value, str | dict):
        return _init_from_json({"name": value} if isinstance(value, str) else value)
    if name == "inner":
        return _inner(value)
    return tuple(value) if isinstance(value, list) else value


def _inner(value: Any) -> Method:
    """Return the method inside another: itself, or by its name, or by its name and fields."""
    if isinstance(value, Method):
        return value
    if isinstance(value, dict) and "name" in value:
        return method_from_json(value)
    if isinstance(value, str):
        return method_from_json({"name": value})
    raise SpecError(f"inner must be a method's name, or its name and fields as {{name: lora, rank: 8}}, not {value!r}")


def _plain(value: Any) -> Any:
    """Return the value of a field as JSON has it: the inverse of `_field`."""
    if isinstance(value, Method | Init):
        return method_to_json(value)
    return list(value) if isinstance(value, tuple) else value


def _words(value: Sequence[str]) -> tuple[str, ...]:
    """Return one word, or a list of words, as a tuple."""
    if not isinstance(value, str | Sequence):
        raise SpecError(f"a pattern or a list of patterns is needed here, not {value!r}")
    return (value,) if isinstance(value, str) else tuple(value)


def _targets_to_json(targets: Targets) -> dict[str, Any]:
    return {"include": list(targets.include), "exclude": list(targets.exclude), "layers": targets.layers}


def _targets_from_json(data: dict[str, Any]) -> Targets:
    return Targets(tuple(data["include"]), tuple(data["exclude"]), data["layers"])
