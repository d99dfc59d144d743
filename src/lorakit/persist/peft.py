"""PEFT's format in both directions, exactly: what PEFT, vLLM and llama.cpp read, and what PEFT wrote.

`adapter_config.json` and `adapter_model.safetensors` are PEFT's. Beside them lies `lorakit.json` with what they cannot
say: the exact spec, the base the adapter was trained on and what for, slices of fused layers, and the checksums of the
other two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit import __version__
from lorakit.core.as_lora import as_lora
from lorakit.core.init import init_of
from lorakit.core.method import Method
from lorakit.core.peft_form import settle
from lorakit.core.registry import method as method_named
from lorakit.core.site import Site
from lorakit.core.spec import AdapterSpec, method_from_json, method_to_json
from lorakit.core.state import AdapterState, Base, Purpose, Update, all_finite, check_shapes, check_tensors
from lorakit.core.targets import modules_named
from lorakit.errors import AdapterFileError, SpecError, TargetError, did_you_mean, grouped, listing
from lorakit.persist import files
from lorakit.persist.card import card, is_ours
from lorakit.persist.peft_config import Settings, config_of
from lorakit.persist.peft_tensors import Reading, trained_to_peft, updates_to_peft
from lorakit.persist.shard import write_tensors
from lorakit.persist.slices import gather, gathers, split

CONFIG, WEIGHTS, PICKLE, NOTE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "lorakit.json"
NOTE_VERSION = 1
_HEADS = ("classifier", "score", "qa_outputs")
_DAMAGED = (KeyError, TypeError, IndexError, AttributeError, SpecError)


def save_peft(state: AdapterState, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write an adapter in PEFT's format, replacing an adapter that lies there in one step; other files stay.

    Args:
        state: the adapter, of a method that has a form in PEFT's files. Pairs of LoRA that subtract their start (PiSSA)
            are written as the LoRA of rank 2r that they equal.
        path: the directory.
        dtype: what the tensors of updates are written in, where it holds them exactly; as they are if None.

    Raises:
        AdapterFileError: a method without a PEFT form, a dtype that would change a value, or a write that failed (the
            old one is intact).
    """
    state = _without_starts(state)
    try:
        config, tensors = to_peft(state)
    except AdapterFileError as why:
        raise AdapterFileError(f"{why}\nlorakit's own format holds it: save(..., format='native')") from why
    old = frozenset({CONFIG, WEIGHTS, PICKLE, NOTE, "adapter.lorakit.safetensors"})
    with files.atomic_directory(path, drop=old) as draft:
        files.write_file(draft / CONFIG, files.to_json(config))
        own = set(trained_to_peft(state.trained, {update.site.path for update in state.updates}))
        write_tensors(draft / WEIGHTS, files.narrowed(tensors, dtype, own))
        sums = {name: files.sha256(draft / name) for name in (CONFIG, WEIGHTS)}
        files.write_file(draft / NOTE, files.to_json(_note(state, from_peft(config, tensors), sums)))
        if is_ours(Path(path) / "README.md"):
            files.write_file(draft / "README.md", card(state))


def load_peft(path: str | Path, *, checked: bool = False) -> AdapterState:
    """Return the adapter in a directory PEFT or lorakit wrote; PEFT's named adapters lie one directory deeper.

    Raises:
        AdapterFileError: naming the file, and every feature, tensor or shape in it that does not fit.
    """
    place = _adapter_directory(files.resting(path))
    config = files.read_json(place / CONFIG)
    note = files.read_json(place / NOTE) if (place / NOTE).exists() else None
    if note is not None:
        _verify(place, note, sums=not checked)
    if (place / WEIGHTS).exists() or not (place / PICKLE).exists():
        tensors, _ = files.read_safetensors(place / WEIGHTS)
    else:
        tensors = files.read_pickle(place / PICKLE)
    spec = None if note is None else _spec_of(note, place / NOTE)
    try:
        state = from_peft(config, tensors, spec)
    except AdapterFileError as problem:
        raise AdapterFileError(f"{place}: {problem}") from problem.__cause__
    return state if note is None else _restored(state, note, place / NOTE)


def to_peft(state: AdapterState) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return `(configuration, tensors)` of an adapter in PEFT's terms.

    Raises:
        AdapterFileError: an adapter without updates, a method without a PEFT form, rows of a grouped convolution.
    """
    state = _without_starts(state)
    if not state.updates:
        raise AdapterFileError("the adapter has no updates, and PEFT's format needs one")
    _refuse(state.updates)
    if state.purpose is not None and state.purpose.labels and state.updates[0].site.kind == "model":
        raise AdapterFileError("PEFT's virtual positions of a classifier are its own")
    by_path: dict[str, list[Update]] = {}
    for update in state.updates:
        by_path.setdefault(update.site.path, []).append(update)
    whole = [gather(updates) for updates in by_path.values()]
    config = config_of(state.spec, state.base.name, whole, _modules_to_save(state, list(by_path)))
    return config, {**updates_to_peft(whole), **trained_to_peft(state.trained, set(by_path))}


def from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: AdapterSpec | None = None
) -> AdapterState:
    """Return the adapter of a PEFT configuration and its tensors, with the spec that means exactly these unless given.

    Two-dimensional pairs have kind "linear" here, and a width the file does not tell is 0; `attach` resolves both
    against the model. Tensors trained whole that
    `modules_to_save` does not name (embeddings PEFT saves by itself) are in `trained` but not in the spec's `train`.

    Raises:
        AdapterFileError: a feature lorakit does not have, or every missing, extra, misshaped or non-finite tensor.
    """
    settings = Settings(config)
    reading = Reading(settings.cls, tensors)
    found = [reading.update(path, settings.method_at(path)) for path in sorted(reading.found, key=_natural)]
    problems = reading.problems
    problems += [f"{name}: holds NaN or infinity" for name, t in reading.trained.items() if not t.isfinite().all()]
    if problems:
        raise AdapterFileError(f"{len(problems)} tensor(s) of the adapter do not fit:\n{listing(grouped(problems))}")
    updates = tuple(update for update in found if update is not None)
    if not updates:
        ends = ", ".join(end.removesuffix(".weight") for end in settings.form.keys.values())
        raise AdapterFileError(f"none of its {len(tensors)} tensors is a {reading.called} factor ({ends})")
    check_tensors(tuple(u for u in updates if u.site.in_))  # of the others `attach` learns the widths
    _refuse_non_finite([u for u in updates if not u.site.in_])
    spec = spec or settings.spec(updates, list(reading.trained))
    copied = () if config.get("ensure_weight_tying") else tuple(settings.copied(list(reading.trained)))
    return AdapterState(spec, updates, reading.trained, Base(config.get("base_model_name_or_path")), apart=copied)


def _refuse(updates: Sequence[Update]) -> None:
    """Raise `AdapterFileError` listing the updates PEFT has no form for, with the reason."""
    bare = sorted({f"{u.site.key}: {u.method.name}" for u in updates if u.method.peft is None})
    if bare:
        raise AdapterFileError(f"these updates have no PEFT form:\n{listing(bare)}")
    if len(kinds := sorted({u.method.name for u in updates})) > 1:
        raise AdapterFileError(f"PEFT has one method for all layers, not {', '.join(kinds)}")
    unlike = [f"{u.site.key}: {why}" for u in updates if u.method.peft and (why := u.method.peft.why_not(u))]
    unlike += [
        f"{u.site.key}: PEFT has no {u.method.name} for rows of a layer"
        for u in updates
        if u.site.rows is not None and u.method.peft and not gathers(u.method)
    ]
    if unlike:
        raise AdapterFileError(f"these updates have no PEFT form:\n{listing(unlike)}")


def _refuse_non_finite(updates: Sequence[Update]) -> None:
    if all_finite([t for u in updates for t in u.tensors.values()]):
        return
    odd = [f"{u.site.key}.{name}: holds NaN or infinity" for u in updates for name, t in u.tensors.items()
           if not t.isfinite().all()]  # fmt: skip
    if odd:
        raise AdapterFileError(f"{len(odd)} adapter tensor(s) do not fit:\n{listing(grouped(odd))}")


def _without_starts(state: AdapterState) -> AdapterState:
    """Return the adapter as plain LoRA, of rank 2r, where a pair keeps a start that it subtracts, as PiSSA's does."""
    plain = all(type(u.method) is method_named("lora") for u in state.updates)
    starts = [init.keeps_start for u in state.updates if (init := init_of(u.method)) is not None]
    return as_lora(state) if plain and any(starts) else state


def _modules_to_save(state: AdapterState, adapted: Sequence[str]) -> list[str]:
    """Return the modules PEFT shall hold as copies of its own: those the spec trains whole.

    A copy is wrong for a weight that may be tied to another (a table without bias, but no classification head): both
    ends must see it. Its plain key lands in the base itself, where they do. The same for a name that PEFT, which
    compares ends without regard to dots, would also find in an adapted layer.
    """
    inside: dict[str, set[str]] = {}
    for name in state.trained:
        steps = name.split(".")
        for n in range(1, len(steps)):
            inside.setdefault(".".join(steps[:n]), set()).add(".".join(steps[n:]))
    hits: set[str] = set()
    for pattern in state.spec.train:
        try:
            hits.update(*modules_named((pattern,), inside).values())
        except TargetError:  # trained beside this adapter's tensors, and not among them
            continue
    outer = {path for path in hits if not any(path.startswith(f"{other}.") for other in hits)}
    whole: set[str] = set()
    for path in outer:
        leaves = {f"{path}.{leaf}".rpartition(".")[0] for leaf in inside[path]}
        tied = {leaf for leaf in leaves if _may_be_tied(leaf, inside[leaf], state)}
        whole |= leaves - tied if tied else {path}
    return sorted(p for p in whole if not any(a.endswith(p) or f".{p}." in f".{a}." for a in adapted))


def _may_be_tied(path: str, tensors: set[str], state: AdapterState) -> bool:
    table = tensors == {"weight"} and state.trained[f"{path}.weight"].dim() == 2
    return table and path.rpartition(".")[2] not in _HEADS


def _note(state: AdapterState, plain: AdapterState, sums: Mapping[str, str]) -> dict[str, Any]:
    """Return lorakit.json: the spec, the base, the checksums, and each update that PEFT's files alone would misread."""
    read = {u.site.path: [(u.site, u.method)] for u in plain.updates}
    here: dict[str, list[Any]] = {}
    for update in state.updates:
        here.setdefault(update.site.path, []).append((update.site, update.method))
    exact = [pair for path, pairs in here.items() if pairs != read.get(path) for pair in pairs]
    return {
        "format": NOTE_VERSION,
        "lorakit": __version__,
        "sha256": dict(sums),
        "base": {"name": state.base.name, "probes": {k: list(v) for k, v in state.base.probes.items()}},
        "purpose": state.purpose and state.purpose.to_json(),
        **({"apart": list(state.apart)} if state.apart else {}),
        "spec": state.spec.to_json(),
        "updates": [
            {"path": s.path, "rows": s.rows and list(s.rows), "kind": s.kind, "method": method_to_json(m)}
            | ({} if _told(s, read.get(s.path)) else {"shape": [s.out, s.in_, *s.kernel], "groups": s.groups})
            for s, m in exact
        ],
    }


def _verify(place: Path, note: Mapping[str, Any], *, sums: bool) -> None:
    """Raise `AdapterFileError` for a note of another format, or, by its `sums`, for files that were changed."""
    if note.get("format") != NOTE_VERSION:
        raise AdapterFileError(
            f"{place / NOTE} has format {note.get('format')!r}, this lorakit reads {NOTE_VERSION}; upgrade lorakit"
        )
    kept = note.get("sha256", {})
    if not isinstance(kept, dict):
        raise AdapterFileError(f"{place / NOTE} is damaged: sha256 must be an object; get the adapter again")
    for name, expected in kept.items() if sums else ():
        if files.sha256(place / name) != expected:
            raise AdapterFileError(
                f"{place / name} was changed after it was saved: its checksum is not the one in {NOTE}; get it again, "
                f"or remove {NOTE} to accept the change"
            )


def _restored(state: AdapterState, note: Mapping[str, Any], file: Path) -> AdapterState:
    """Return a state read from PEFT's files with what lorakit.json adds to them."""
    try:
        parts: dict[str, list[Any]] = {}
        for entry in note["updates"]:
            rows = None if entry["rows"] is None else (int(entry["rows"][0]), int(entry["rows"][1]))
            shape = entry.get("shape") and (*entry["shape"], entry["groups"])
            parts.setdefault(entry["path"], []).append((rows, entry["kind"], method_from_json(entry["method"]), shape))
        named = [u if u.site.path else replace(u, site=u.site.at(next(iter(parts), "")))
                 for u in state.updates]  # fmt: skip
        if unknown := sorted(parts.keys() - {u.site.path for u in named}):
            raise KeyError(f"no tensors for {unknown[0]}")
        updates = tuple(part for whole in named for part in _exact(whole, parts.get(whole.site.path)))
        updates = settle(updates, [_site(u, parts.get(u.site.path)) for u in updates])
        if parts:
            check_shapes(tuple(u for u in updates if u.site.in_))
        probes = {path: tuple(values) for path, values in note["base"]["probes"].items()}
        base = Base(note["base"]["name"], probes)
        purpose = Purpose.from_json(note.get("purpose"))
        apart = tuple(map(str, note.get("apart", ())))
        return replace(state, updates=updates, base=base, purpose=purpose, apart=apart)
    except _DAMAGED as bad:
        raise _damaged(file, bad) from bad


def _spec_of(note: Mapping[str, Any], file: Path) -> AdapterSpec:
    try:
        return AdapterSpec.from_json(note["spec"])
    except _DAMAGED as bad:
        raise _damaged(file, bad) from bad


def _damaged(file: Path, bad: Exception) -> AdapterFileError:
    return AdapterFileError(f"{file} is damaged or of another version ({bad}); get the adapter again")


def _exact(whole: Update, parts: list[Any] | None) -> tuple[Update, ...]:
    if parts is None:
        return (whole,)
    rows, kind, method, _ = parts[0]
    whole = replace(whole, site=replace(whole.site, kind=kind))
    if rows is None:
        return (replace(whole, method=method),)
    return split(whole, [(span, own) for span, _, own, _ in parts])


def _told(site: Site, read: list[tuple[Site, Method]] | None) -> bool:
    """Return whether PEFT's files alone tell the shape of a whole layer."""
    if site.rows is not None:
        return True
    return read is not None and (site.shape, site.groups) == (read[0][0].shape, read[0][0].groups)


def _site(update: Update, parts: list[Any] | None) -> Site:
    """Return the site of an update, with the shape its note adds to it."""
    shape = parts and parts[0][3]
    if not shape:
        return update.site
    out, in_, *kernel, groups = shape
    return replace(update.site, out=out, in_=in_, kernel=tuple(kernel), groups=groups)


def _adapter_directory(place: Path) -> Path:
    """Return where the configuration lies: here, or in the one directory below that has one."""
    if (place / CONFIG).exists() or not place.is_dir():
        return place
    below = sorted(p.parent for p in place.glob(f"*/{CONFIG}"))
    if len(below) > 1:
        names = [p.name for p in below]
        raise AdapterFileError(f"{place} holds {len(below)} adapters; name one of: {', '.join(names)}")
    if not below:
        near = did_you_mean(CONFIG, [p.name for p in place.iterdir()])
        raise AdapterFileError(f"{place / CONFIG} is missing{near}")
    return below[0]


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(step), "") if step.isdigit() else (-1, step) for step in path.split(".")]
