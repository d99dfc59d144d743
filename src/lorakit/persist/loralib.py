"""The original LoRA package's files: a torch pickle of `<path>.lora_A`, `<path>.lora_B` and the head.

    Linear, Embedding   lora_A (r, in)       lora_B (out, r)
    MergedLinear        lora_A (r n, in)     lora_B (out n / N, r)     n enabled of N fused projections

The files store no alpha and no trace of which projections a MergedLinear enables; both must be given.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit.core.registry import method as method_named
from lorakit.core.site import Site
from lorakit.core.spec import AdapterSpec, Override, Targets
from lorakit.core.state import AdapterState, Update, check_tensors
from lorakit.errors import AdapterFileError, SpecError, listing
from lorakit.persist import files
from lorakit.persist.peft_config import dotted_ends, exact

_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])")


def load_loralib(
    path: str | Path, *, alpha: float | None, r: int | None = None, enabled: Sequence[bool] | None = None
) -> AdapterState:
    """Return the adapter in a loralib file; its other tensors (the head) become modules trained whole.

    Args:
        path: the `.bin` or `.pt` file.
        alpha: the `lora_alpha` it was trained with.
        r: the rank it should have, as a check; it is read from the shapes.
        enabled: which projections of its MergedLinear layers have an update, as `enable_lora` had it.

    Raises:
        AdapterFileError: a pickle with more than tensors, a missing alpha, or every tensor that makes no pair.
    """
    if alpha is None:
        raise AdapterFileError(
            f"{path}: loralib files do not store alpha; pass alpha=... (--alpha) as it was trained "
            "(the paper's released RoBERTa-base scripts use r 8 and alpha 16)"
        )
    pairs, trained = _sorted_out(files.read_pickle(path))
    lora: Any = method_named("lora")
    updates: list[Update] = []
    problems: list[str] = []
    for module, pair in pairs.items():
        if wrong := _wrong(pair, r, enabled):
            problems.append(f"{module}: {wrong}")
            continue
        try:
            method = lora(rank=pair["B"].shape[1], alpha=float(alpha))
        except SpecError as bad:
            raise AdapterFileError(f"{path}: {bad}") from bad
        updates += _updates(module, pair, method, enabled)
    problems += [f"{name}: holds NaN or infinity" for name, t in trained.items() if not t.isfinite().all()]
    if problems:
        raise AdapterFileError(f"{path}: {len(problems)} tensor(s) do not fit:\n{listing(problems)}")
    if not updates:
        raise AdapterFileError(
            f"{path} holds {len(trained)} tensors, none of them lora_A or lora_B: not a loralib adapter"
        )
    check_tensors(tuple(updates))
    return AdapterState(_spec(updates, list(trained)), tuple(updates), trained)


def _sorted_out(tensors: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return the factors by module path, and the other tensors."""
    pairs: dict[str, dict[str, Tensor]] = {}
    trained: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if found := _FACTOR.fullmatch(name):
            pairs.setdefault(found["path"], {})[found["side"]] = tensor
        else:
            trained[name] = tensor
    return pairs, trained


def _wrong(pair: dict[str, Tensor], r: int | None, enabled: Sequence[bool] | None) -> str | None:
    """Return why two factors are no update, or None."""
    if missing := [side for side in "AB" if side not in pair]:
        return f"lora_{missing[0]} is missing"
    a, b = pair["A"], pair["B"]
    shapes = f"lora_A {tuple(a.shape)}, lora_B {tuple(b.shape)}"
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] % b.shape[1]:
        return f"{shapes} do not multiply; expected (r, in) and (out, r)"
    if r is not None and b.shape[1] != r:
        return f"{shapes} have rank {b.shape[1]}, not {r}"
    n = a.shape[0] // b.shape[1]
    if n > 1 and enabled is None:
        return (
            f"{shapes} are a MergedLinear with {n} projections; pass enabled=..., for q and v (True, False, True), "
            "or --enabled yes,no,yes"
        )
    if enabled is not None and n != sum(enabled):
        return f"{shapes} have {n} projection(s), but enabled={tuple(enabled)} names {sum(enabled)}"
    if b.shape[0] % n:
        return f"{shapes}: {b.shape[0]} rows do not divide among {n} projections"
    return None


def _updates(path: str, pair: dict[str, Tensor], method: Any, enabled: Sequence[bool] | None) -> list[Update]:
    a, b = pair["A"], pair["B"]
    if enabled is None:
        return [Update(Site(path, b.shape[0], a.shape[1]), method, {"down": a, "up": b})]
    height, rank = b.shape[0] // sum(enabled), method.rank
    whole = Site(path, height * len(enabled), a.shape[1])
    positions = [i for i, on in enumerate(enabled) if on]
    return [
        Update(
            whole.slice(i * height, (i + 1) * height),
            method,
            {"down": a[k * rank : (k + 1) * rank].clone(), "up": b[k * height : (k + 1) * height].clone()},
        )
        for k, i in enumerate(positions)
    ]


def _spec(updates: list[Update], trained: list[str]) -> AdapterSpec:
    """Return the spec of these updates: the most common rank, overrides for the others."""
    methods: dict[str, Any] = {u.site.path: u.method for u in updates}
    common = Counter(methods.values()).most_common(1)[0][0]
    ranks = sorted({m.rank for m in methods.values()} - {common.rank})
    whole = list(dict.fromkeys(name.rpartition(".")[0] for name in trained))
    ends, inside = dotted_ends(list(methods)), dotted_ends(whole)
    targets = [exact(u.site.path, ends) if u.site.rows is None else u.site.key for u in updates]
    return AdapterSpec(
        common,
        Targets(tuple(targets)),
        train=tuple(exact(path, inside) for path in whole if path),
        overrides=tuple(
            Override(Targets(tuple(exact(p, ends) for p, m in methods.items() if m.rank == rank)), (("rank", rank),))
            for rank in ranks
        ),
    )
