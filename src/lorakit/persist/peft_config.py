"""PEFT's `adapter_config.json`: what it says in lorakit's terms, what lorakit does not have, and how ours is written.

Its patterns are regular expressions tried in order against the end of a path, and PEFT re-sorts them when it saves.
Ours are whole paths, escaped and anchored (`^h\\.0\\.attn$`), so no two match one layer and order means nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any

from lorakit.core.method import Method
from lorakit.core.peft_form import PeftForm, differing, get, put
from lorakit.core.registry import methods
from lorakit.core.site import Site
from lorakit.core.spec import AdapterSpec, Override, Targets
from lorakit.core.state import Update
from lorakit.errors import AdapterFileError, SpecError, listing, shown
from lorakit.persist.slices import alpha_for

# Fields with no bearing on what the saved tensors compute: how they were found, drawn or tied, and bookkeeping.
_NO_BEARING = frozenset(
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode runtime_config "
    "target_modules exclude_modules layers_to_transform layers_pattern modules_to_save ensure_weight_tying "
    "fan_in_fan_out".split()
)
_NEEDED = ("r", "init_r", "lora_alpha", "alpha")
_MOST = 10**9  # a rank or an alpha beyond it is a mistake
_MOVE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def method_of(config: Mapping[str, Any]) -> type[Method]:
    """Return the method of a PEFT configuration: by its type, and among several by the flag that is set.

    Raises:
        AdapterFileError: naming a type, or every feature, that lorakit does not have.
    """
    kind = config.get("peft_type")
    forms = [(cls, cls.peft) for cls in methods().values() if cls.peft is not None]
    of_type = [(cls, form) for cls, form in forms if form.type == kind]
    if not of_type:
        known = ", ".join(sorted({form.type for _, form in forms}))
        raise AdapterFileError(f"the adapter is of PEFT type {kind!r}; this lorakit reads {known}")
    flagged = [(cls, form) for cls, form in of_type if form.flag is not None and config.get(form.flag)]
    cls, form = (flagged or [(cls, form) for cls, form in of_type if form.plain])[0]
    _refuse_features(config, form)
    return cls


def _refuse_features(config: Mapping[str, Any], form: PeftForm) -> None:
    """Raise `AdapterFileError` naming every feature of a PEFT configuration that lorakit does not have."""
    known = {*_NO_BEARING, *form.no_bearing, *form.fields, *form.patterns.values(), *form.settings, form.flag}
    used = [
        f"{name} = {value!r}"
        for name, value in config.items()
        if name not in {*known, form.dropout} and value not in (None, False, {}, [])
    ]
    for name, value in form.settings.items():
        given = config.get(name, value)
        moved = name.startswith("init") and isinstance(given, str) and given.startswith(_MOVE_THE_BASE)
        if moved:
            used.append(
                f"{name} = {given!r}: it changed the base weights; in PEFT, save_pretrained(..., "
                "path_initial_model_for_weight_conversion=...) turns it into a plain LoRA"
            )
        elif given != value and not name.startswith("init") and (given or value):
            used.append(f"{name} = {given!r}" + ": trained biases" * (name == "bias"))
    if used:
        raise AdapterFileError(f"the adapter uses what lorakit does not have:\n{listing(used)}")


class Settings:
    """What a PEFT configuration says about each layer's method."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.cls = method_of(config)
        assert self.cls.peft is not None
        self.form: PeftForm = self.cls.peft
        self.config = config
        if missing := [key for key in self.form.fields if key in _NEEDED and key not in config]:
            raise AdapterFileError(f"the configuration lacks {', '.join(missing)}")
        dropout = config.get(self.form.dropout or "") or 0.0
        if not isinstance(dropout, int | float) or abs(dropout) > _MOST:
            raise AdapterFileError(
                f"the configuration is wrong: {self.form.dropout} must be a number, not {shown(dropout)}"
            )
        self.dropout = float(dropout)
        self.whole = tuple(config.get("modules_to_save") or ())
        self.method = self._method(None)
        self._alike = self.form.of_config is None and not any(map(config.get, self.form.patterns.values()))

    def method_at(self, path: str) -> Any:
        """Return the method of the layer at `path`."""
        return self.method if self._alike else self._method(path)

    def _method(self, path: str | None) -> Any:
        usual: Any = self.cls()
        values: dict[str, Any] = {}
        for key, name in self.form.fields.items():
            value = self.config.get(key, get(usual, name))
            if path is not None and key in self.form.patterns:
                patterns = self.config.get(self.form.patterns[key]) or {}
                if not isinstance(patterns, dict):
                    told = f"{self.form.patterns[key]} must be an object, not {shown(patterns)}"
                    raise AdapterFileError(f"the configuration is wrong: {told}")
                value = _first(patterns, path, value)
            values[name] = _checked(key, value, get(usual, name))
        try:
            if path is not None and self.form.of_config is not None:
                values |= self.form.of_config(self.config, path)
            return put(usual, values)
        except SpecError as bad:
            raise AdapterFileError(f"the configuration is wrong: {bad}") from bad

    def spec(self, updates: Sequence[Update], trained: Sequence[str]) -> AdapterSpec:
        """Return the spec that means exactly these updates, with an override for each other rank or alpha."""
        paths = [u.site.path for u in updates]
        ends = dotted_ends(paths)
        usual = self.method if any(u.method == self.method for u in updates) else updates[0].method
        groups: dict[tuple[tuple[str, Any], ...], list[str]] = {}
        for update in updates:
            if other := differing(update.method, usual):
                groups.setdefault(other, []).append(update.site.path)
        whole = self._saved_whole(trained)
        return AdapterSpec(
            usual,
            Targets(tuple(exact(path, ends) for path in paths)) if paths and not self.form.alone else Targets(),
            train=tuple(exact(path, dotted_ends(whole)) for path in whole),
            dropout=self.dropout,
            overrides=tuple(
                Override(Targets(tuple(exact(p, ends) for p in at)), other) for other, at in groups.items()
            ),
        )

    def copied(self, trained: Sequence[str]) -> list[str]:
        """Return the tensors of the modules that PEFT means by `modules_to_save`."""
        inside = tuple(f"{path}." for path in self._saved_whole(trained))
        return [name for name in trained if name.startswith(inside)]

    def _saved_whole(self, trained: Sequence[str]) -> list[str]:
        """Return the paths PEFT means by `modules_to_save`, an end of the path with or without a dot before it."""
        found: list[str] = []
        for name in trained:
            steps = name.split(".")
            above = [".".join(steps[:n]) for n in range(1, len(steps))]
            hit = next((path for path in above if any(path.endswith(end) for end in self.whole)), None)
            if hit is not None and hit not in found:
                found.append(hit)
        return found


def dotted_ends(paths: Sequence[str]) -> set[str]:
    """Return what stands behind a dot in any of the paths: `b.c` and `c` of `a.b.c`."""
    return {path[dot + 1 :] for path in paths for dot, sign in enumerate(path) if sign == "."}


def exact(path: str, ends: Collection[str]) -> str:
    """Return a target pattern that means `path` and no other of the paths that have these ends."""
    return f"re:{re.escape(path)}" if path in ends else path


def config_of(spec: AdapterSpec, name: str | None, updates: Sequence[Update], whole: Sequence[str]) -> dict[str, Any]:
    """Return the PEFT configuration of whole-layer updates of one method and of the modules trained whole.

    Raises:
        AdapterFileError: a value that differs between layers where PEFT has one for all.
    """
    form = updates[0].method.peft
    assert form is not None
    setting = {u.site.path: {**_values(u.method, form, spec), **(form.says(u) if form.says else {})} for u in updates}
    paths = sorted(setting)
    varying = [key for key in form.fields if key in form.patterns]
    usual = dict(zip(varying, Counter(tuple(v[k] for k in varying) for v in setting.values()).most_common(1)[0][0]))  # noqa: B905
    for key in form.fields:
        if key not in varying and len({setting[path][key] for path in paths}) > 1:
            raise AdapterFileError(f"PEFT's {form.type} has one {key} for all layers, and this adapter has several")
    return {
        "peft_type": form.type,
        "task_type": None,
        "base_model_name_or_path": name,
        "inference_mode": True,
        **{key: usual.get(key, setting[paths[0]][key]) for key in form.fields},
        **{
            form.patterns[key]: {_anchored(p): setting[p][key] for p in paths if setting[p][key] != usual[key]}
            for key in varying
        },
        **({} if form.alone else {"target_modules": _targets(paths)}),
        "modules_to_save": list(whole) or None,
        **({form.dropout: spec.dropout} if form.dropout else {}),
        **({"fan_in_fan_out": _all_transposed([u.site for u in updates])} if "transposed-linear" in form.kinds else {}),
        **form.settings,
        **({form.flag: True} if form.flag else {}),
        **(_more(form, updates) if form.config else {}),
    }


def _more(form: PeftForm, updates: Sequence[Update]) -> Mapping[str, Any]:
    assert form.config is not None
    try:
        return form.config(updates)
    except SpecError as bad:
        raise AdapterFileError(str(bad)) from bad


def _values(method: Method, form: PeftForm, spec: AdapterSpec) -> dict[str, Any]:
    """Return what the configuration says of a method, with the `use_rslora` of the spec's."""
    values = {key: get(method, name) for key, name in form.fields.items()}
    if (name := form.fields.get("use_rslora")) is not None:
        usual = bool(get(spec.method, name)) if type(spec.method) is type(method) else False
        if values["use_rslora"] != usual:
            scale = get(method, form.fields["lora_alpha"].replace("alpha", "scale"))
            values |= {"lora_alpha": alpha_for(scale, values["r"], usual), "use_rslora": usual}
    return values


def _checked(key: str, value: Any, usual: Any) -> Any:
    """Return a value of the configuration as the field's kind has it, or raise `AdapterFileError`."""
    if isinstance(usual, bool):
        return bool(value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(usual, float) and not (number and abs(value) <= _MOST):
        raise AdapterFileError(f"the configuration is wrong: {key} must be a number, not {shown(value)}")
    if isinstance(usual, int) and not (number and isinstance(value, int) and abs(value) <= _MOST):
        raise AdapterFileError(f"the configuration is wrong: {key} must be a whole number, not {shown(value)}")
    return float(value) if isinstance(usual, float) else value


def _first(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of `path`, as PEFT looks it up."""
    return next((value for pattern, value in patterns.items() if _ends(path, pattern)), default)


def _ends(path: str, pattern: str) -> bool:
    """Return whether a pattern matches the end of `path`; it is a stranger's, so for a moment at most.

    Python's `re` never gives up on `((a+)+)+b` and lets nobody else run meanwhile. `regex`, which transformers and so
    the server bring, does what it does within a time.
    """
    engine, limit = _engine()
    try:
        return engine.match(rf"(.*\.)?({pattern})$", path, **limit) is not None
    except TimeoutError:
        raise AdapterFileError(
            f"the pattern {shown(pattern)} takes too long to be matched with {path}; write the module's name"
        ) from None
    except engine.error as bad:
        raise AdapterFileError(f"the pattern {shown(pattern)} is not a regular expression: {bad}") from None


@cache
def _engine() -> tuple[Any, dict[str, float]]:
    """Return what matches patterns, and within which time."""
    try:
        return import_module("regex"), {"timeout": 0.1}
    except ModuleNotFoundError:
        return re, {}


def _anchored(path: str) -> str:
    return f"^{re.escape(path)}"


def _targets(paths: list[str]) -> list[str] | str:
    """Return the paths; as one regular expression where a bare name among them would match every path that ends so."""
    if all("." in path for path in paths):
        return paths
    return "|".join(re.escape(path) for path in paths)


def _all_transposed(sites: Sequence[Site]) -> bool:
    flat = [site.kind for site in sites if site.kind in ("linear", "transposed-linear")]
    return bool(flat) and all(kind == "transposed-linear" for kind in flat)
