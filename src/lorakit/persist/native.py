"""lorakit's own format: one safetensors file that holds every method, slices included, bit for bit.

Keys are `<path or path[rows]>.<tensor>` as the method declares them, `shared:<word>` for a tensor that sites share and
`trained:<name>` for the base's own; the metadata holds the spec, the sites with their methods, the base, and what the
adapter is for. Checkpoints use it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit import __version__
from lorakit.core.jsontext import parse_json
from lorakit.core.site import Site
from lorakit.core.spec import AdapterSpec, method_from_json, method_to_json
from lorakit.core.state import AdapterState, Base, Purpose, Update, check_tensors
from lorakit.errors import AdapterFileError, listing
from lorakit.persist import files
from lorakit.persist.shard import write_tensors

NATIVE = "adapter.lorakit.safetensors"
VERSION = 1
_TRAINED, _SHARED = "trained:", "shared:"


def save_native(state: AdapterState, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write an adapter as `adapter.lorakit.safetensors` in a directory, in one step; other files stay.

    Raises:
        AdapterFileError: a write that failed; the old adapter is intact.
    """
    others = frozenset({"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "lorakit.json"})
    with files.atomic_directory(path, drop=others) as draft:
        write_native(draft / NATIVE, state, dtype)


def load_native(path: str | Path) -> AdapterState:
    """Return the adapter in a directory `save_native` wrote, or in the file itself.

    Raises:
        AdapterFileError: naming the file, and every missing, extra, misshaped or non-finite tensor.
    """
    place = files.resting(path)
    file = place / NATIVE if place.is_dir() else place
    tensors, metadata = files.read_safetensors(file)
    if "lorakit" not in metadata:
        raise AdapterFileError(f"{file} is a safetensors file, but not a lorakit adapter: its metadata does not say so")
    try:
        head = parse_json(metadata["lorakit"])
        if head["format"] != VERSION:
            raise AdapterFileError(f"{file} has format {head['format']}, this lorakit reads {VERSION}; upgrade lorakit")
        return _state(head, tensors)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as bad:
        raise AdapterFileError(f"{file} is damaged or of another version ({bad}); get it again") from bad
    except AdapterFileError as problem:
        raise AdapterFileError(f"{file}: {problem}") from problem.__cause__


def write_native(file: Path, state: AdapterState, dtype: torch.dtype | None = None) -> None:
    """Write the native file of an adapter, tensor by tensor, so that live ones need no copy.

    Raises:
        AdapterFileError: a write that failed.
    """
    head = {
        "format": VERSION,
        "lorakit": __version__,
        "spec": state.spec.to_json(),
        "sites": [{**_site_to_json(u.site), "method": method_to_json(u.method)} for u in state.updates],
        "base": {"name": state.base.name, "probes": {k: list(v) for k, v in state.base.probes.items()}},
        "trained": list(state.trained),
        "purpose": state.purpose and state.purpose.to_json(),
        **({"apart": list(state.apart)} if state.apart else {}),
    }
    tensors = {_key(u, name): t for u in state.updates for name, t in u.tensors.items()}
    tensors.update({f"{_TRAINED}{name}": t for name, t in state.trained.items()})
    # One metadata key: safetensors writes several in random order, and equal adapters shall give equal bytes.
    tensors = files.narrowed(tensors, dtype, {f"{_TRAINED}{name}" for name in state.trained})
    write_tensors(file, tensors, {"lorakit": json.dumps(head, separators=(",", ":"))})


def _state(head: dict[str, Any], tensors: dict[str, Tensor]) -> AdapterState:
    by_key: dict[str, dict[str, Tensor]] = {}
    shared = {key: tensors[key] for key in tensors if key.startswith(_SHARED)}
    for key, tensor in tensors.items():
        if key not in shared:
            by_key.setdefault(_TRAINED if key.startswith(_TRAINED) else key.rpartition(".")[0], {})[key] = tensor
    used: set[str] = set()
    updates = []
    for entry in head["sites"]:
        site = _site_from_json(entry)
        own = {key.rpartition(".")[2]: t for key, t in by_key.pop(site.key, {}).items()}
        method = method_from_json(entry["method"])
        together = {name: f"{_SHARED}{d.shared}" for name, d in method.tensors(site).items() if d.shared is not None}
        own |= {name: shared[key] for name, key in together.items() if key in shared}
        used |= set(together.values())
        updates.append(Update(site, method, own))
    rest = {key: t for group in by_key.values() for key, t in group.items()}
    rest |= {key: t for key, t in shared.items() if key not in used}
    names = {f"{_TRAINED}{name}": name for name in head["trained"]}
    problems = [f"{key}: missing" for key in names if key not in rest]
    problems += [f"{key}: extra, of no site of this adapter" for key in rest if key not in names]
    problems += [f"{key}: holds NaN or infinity" for key in names if key in rest and not rest[key].isfinite().all()]
    if problems:
        raise AdapterFileError(f"{len(problems)} tensor(s) do not fit:\n{listing(problems)}")
    check_tensors(tuple(updates))
    base = Base(head["base"]["name"], {k: tuple(v) for k, v in head["base"]["probes"].items()})
    trained = {name: rest[key] for key, name in names.items()}
    purpose = Purpose.from_json(head.get("purpose"))
    spec, apart = AdapterSpec.from_json(head["spec"]), tuple(head.get("apart", ()))
    return AdapterState(spec, _in_declared_order(updates), trained, base, purpose, apart)


def _key(update: Update, name: str) -> str:
    """Return the key of a tensor: its site's, or the word under which sites share it."""
    shared = update.method.tensors(update.site)[name].shared
    return f"{update.site.key}.{name}" if shared is None else f"{_SHARED}{shared}"


def _in_declared_order(updates: list[Update]) -> tuple[Update, ...]:
    return tuple(
        Update(u.site, u.method, {name: u.tensors[name] for name in u.method.tensors(u.site)}) for u in updates
    )


def _site_to_json(site: Site) -> dict[str, Any]:
    return {
        "path": site.path,
        "out": site.out,
        "in": site.in_,
        "kernel": list(site.kernel),
        "rows": None if site.rows is None else list(site.rows),
        "kind": site.kind,
        "groups": site.groups,
        "fused_out": site.fused_out,
        "bias": site.bias,
        **({"habits": sorted(site.habits)} if site.habits else {}),
    }


def _site_from_json(data: dict[str, Any]) -> Site:
    rows = None if data["rows"] is None else (int(data["rows"][0]), int(data["rows"][1]))
    kernel, groups, fused = tuple(data["kernel"]), data["groups"], data["fused_out"]
    return Site(data["path"], data["out"], data["in"], kernel, rows, data["kind"], groups, fused, data.get("bias"),
                frozenset(data.get("habits", ())))  # fmt: skip
