"""Fold attached adapters into the base weights: `W + sum_i w_i dW_i(W)`, summed in fp32, cast once.

Every dW is measured from the same frozen W, so order cannot matter; every check runs, and every sum is proved finite,
before the first weight changes. To unmerge, keep the base: subtracting in 16 bits does not give it back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lorakit.core.adapters import Adapted, Adapter, Adapters, Weight
from lorakit.core.hollow import is_divided
from lorakit.core.method import Static
from lorakit.core.state import Update, delta_of
from lorakit.errors import MergeError, grouped, listing
from lorakit.inject.attach import detach
from lorakit.inject.ledger import ledger_of

_BLOCK = 1 << 20  # values of a weight that are compared at once: a layer is large enough without copies of it


@dataclass(frozen=True)
class MergeReport:
    """What a merge did: layers changed, the largest change of a weight, and what rounding took from it."""

    layers: int
    largest_change: float
    largest_rounding: float
    update_lost: float
    """`|kept - exact|_F / |update|_F` over all layers: how much of the update the weights could not hold."""


MOST_LOST = 0.5
"""The share of an update that rounding may take before a merge is refused (Frobenius)."""


def refuse_lost(share: float) -> None:
    """Raise `MergeError` where rounding would take most of an update."""
    if share > MOST_LOST:
        raise MergeError(
            f"nothing was written: rounding the merged weights would take {share:.0%} of the update "
            "(Frobenius), so most of it would be lost; write fp32 instead"
        )


@dataclass
class Tally:
    """What the layers merged so far changed, and what rounding took from it."""

    layers: int = 0
    change: float = 0.0
    rounding: float = 0.0
    update: float = 0.0
    lost: float = 0.0

    def add(self, before: Tensor, total: Tensor, kept: Tensor) -> None:
        """Count a layer: its weight before, the exact sum, and what is kept of it."""
        self.layers += 1
        self.compare(before, total, kept)

    def compare(self, before: Tensor, total: Tensor, kept: Tensor) -> None:
        """Add what changed and what rounding took of it, in blocks of rows."""
        height = max(1, _BLOCK * total.shape[0] // max(1, total.numel()))
        for start in range(0, total.shape[0], height):
            rows = slice(start, start + height)
            exact = total[rows]
            moved, off = exact - before[rows].to(exact.dtype), kept[rows].to(exact.dtype) - exact
            self.change = max(self.change, float(moved.abs().max()))
            self.rounding = max(self.rounding, float(off.abs().max()))
            self.update += float(moved.square().sum())
            self.lost += float(off.square().sum())

    def report(self) -> MergeReport:
        """Return the report of all layers."""
        share = math.sqrt(self.lost / self.update) if self.update else 0.0
        return MergeReport(self.layers, self.change, self.rounding, share)


@torch.no_grad()
def merge(
    model: nn.Module,
    names: Sequence[str] | None = None,
    *,
    untie: bool = False,
    lossy: bool = False,
    exact: Mapping[str, Tensor] | None = None,
) -> MergeReport:
    """Fold adapters into their layers' weights in place and take them off.

    Args:
        model: a model with attached adapters.
        names: which adapters, with the weights they act with now; all active ones by default. Others stay attached,
            if what they do does not depend on the weights.
        untie: give a layer whose weight another module shares a copy of its own, instead of refusing.
        lossy: merge into quantised weights as well, which rounds them a second time; `update_lost` says what it cost.
        exact: values of parameters that were trained whole, before they were rounded to the model's dtype, by name;
            `update_lost` counts them too.

    Raises:
        MergeError: an update that depends on the input, a per-row weight, a tied weight, a quantised weight without
            `lossy`, an adapter that would stay and depends on the weights, NaN or infinity, a base divided among
            processes.
        AttachError: a name that is not attached.
    """
    ledger = ledger_of(model)
    if ledger.base is not None or any(map(is_divided, model.parameters())):
        raise MergeError(
            "this model's weights are divided among processes; save the adapter and merge it with "
            "`lorakit merge`, or load both into one process"
        )
    layers = {path: m for path, m in model.named_modules() if isinstance(m, Adapted)}
    shared = shared_weights(model)
    if names is None:
        names = [
            n for n in ledger.specs if any(n in m.adapters.weights for m in layers.values()) or n in ledger.swapped_in
        ]
    for name in names:
        ledger.require(name)
    merging = {path: _weights(m.adapters, names) for path, m in layers.items()}
    merging = {path: weights for path, weights in merging.items() if weights}
    _refuse_idle(names, merging, ledger.swapped_in)
    _refuse({path: cast(nn.Module, layers[path]) for path in merging}, merging, {} if untie else shared, lossy)
    tally = Tally()
    for write in (False, True):  # a first pass proves every sum finite, so that a refusal changes nothing
        for path, weights in merging.items():
            module = cast(nn.Module, layers[path])
            here = merged_weight(path, module, weights)
            if write:
                if path in shared:
                    _untie(model, module)
                store = cast(Adapters, module.adapters).host.store
                before = store.read(module).to(here.total.dtype, copy=True)
                store.write(module, here.kept)
                tally.add(before, here.total, store.read(module))
    for key, values in (exact or {}).items():
        if key in ledger.resting:
            tally.compare(ledger.resting[key], values, model.get_parameter(key))
    for name in names:
        ledger.keep_trained(model, name)
        detach(model, name)
    return tally.report()


def _refuse_idle(names: Sequence[str], merging: dict[str, dict[str, Weight]], whole: set[str]) -> None:
    """Raise `MergeError` for adapters that do not act now: folding them in would drop them without a trace."""
    acting = {name for weights in merging.values() for name in weights} | whole
    if not names or (idle := [name for name in names if name not in acting]):
        which = ", ".join(map(repr, idle)) if names else "no adapter"
        verb = "is switched off" if names else "is active on this model"
        raise MergeError(f"{which} {verb}, so there is nothing to merge; switch it on with use(model, {{name: 1.0}})")


def shared_weights(model: nn.Module) -> dict[str, list[str]]:
    """Return, for each module whose weight other modules hold too, the other names of that weight."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter.data_ptr() or id(parameter), []).append(name)
    return {
        name.removesuffix(".weight"): [other for other in group if other != name]
        for group in names.values()
        if len(group) > 1
        for name in group
    }


def _untie(model: nn.Module, module: nn.Module) -> None:
    """Give a module a copy of its weight, and the configuration the word that it is its own."""
    weight = module.get_parameter("weight")
    module.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if (config := getattr(model, "config", None)) is not None:
        config.tie_word_embeddings = False


@dataclass(frozen=True)
class Merged:
    """A merged canonical weight: the exact sum, and that in the dtype it is kept in (itself where that is lossy)."""

    total: Tensor
    kept: Tensor


def merged_weight(
    path: str, module: nn.Module, weights: Mapping[str, Weight], dtype: torch.dtype | None = None
) -> Merged:
    """Return `W + sum_i w_i dW_i(W)` of an adapted layer, kept in `dtype` (by default the weight's own).

    Raises:
        MergeError: values that are NaN, or too large for the dtype.
    """
    adapters = cast(Adapters, module.adapters)
    weight = adapters.host.store.read(module)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    total = wide.clone()
    for name, adapter in adapters.named():
        if name in weights:
            total += _times(float(weights[name]), adapter.delta(wide))
    cast_once = total.to(dtype or weight.dtype)
    if not cast_once.isfinite().all():
        bad = int((~cast_once.isfinite()).sum())
        raise MergeError(
            f"{path}: merging would write {bad:,} NaN or infinite values of {cast_once.numel():,} in "
            f"{cast_once.dtype}; the base is unchanged; check the adapter, or merge in a wider dtype"
        )
    return Merged(total, cast_once)


def _times(share: float, delta: Tensor) -> Tensor:
    return delta if share == 1.0 else share * delta


def _weights(adapters: Adapters, names: Sequence[str]) -> dict[str, Weight]:
    return {name: weight for name, weight in adapters.weights.items() if name in names}


def _refuse(
    layers: dict[str, nn.Module], merging: dict[str, dict[str, Weight]], shared: dict[str, list[str]], lossy: bool
) -> None:
    """Raise `MergeError` listing every layer that cannot be merged."""
    problems: list[str] = []
    for path, module in layers.items():
        host = cast(Adapters, module.adapters).host
        if not (host.store.lossless or lossy):
            kept = f"its weight is quantised ({host.store_name}), and the sum would be rounded again"
            problems.append(f"{path}: {kept}; merge into the 16-bit base instead, or pass lossy=True")
        for name, weight in merging[path].items():
            if isinstance(weight, Tensor) and weight.dim() > 0:
                problems.append(f"{path}: {name!r} has one weight per row; choose a number with use() first")
    acting = {path: set(weights) for path, weights in merging.items()}
    problems += not_a_weight(layers, acting) + _left_behind(layers, acting)
    problems += [f"{tied}; pass untie=True" for tied in tied_weights(layers, shared)]
    if problems:
        count = len({problem.partition(": ")[0] for problem in problems})
        raise MergeError(f"the model is unchanged; {count} layer(s) cannot be merged:\n{listing(grouped(problems))}")


def _left_behind(layers: Mapping[str, nn.Module], acting: Mapping[str, set[str]]) -> list[str]:
    """Return what speaks against leaving an adapter attached that is measured from the weight a merge changes."""
    problems, leans = [], dict[type, bool]()
    for path, module in layers.items():
        for name, adapter in cast(Adapters, module.adapters).named():
            method = adapter.method
            if name in acting[path]:
                continue
            if type(method) not in leans:
                leans[type(method)] = _leans(adapter)
            if leans[type(method)]:
                problems.append(
                    f"{path}: {name!r} ({method.name}) would stay, and is measured from the weight that changes; merge "
                    "both, or detach it first"
                )
    return problems


def _leans(adapter: Adapter) -> bool:
    """Return whether what an update does depends on the layer's own weight."""
    if not isinstance(adapter.method, Static):
        return adapter.method.reads == "output"
    return delta_of(Update(adapter.site, adapter.method, adapter.tensors())) is None


def not_a_weight(layers: Mapping[str, nn.Module], acting: Mapping[str, set[str]]) -> list[str]:
    """Return what speaks against layers whose acting updates are no change of a weight."""
    problems = []
    for path, module in layers.items():
        for name, adapter in cast(Adapters, module.adapters).named():
            if name in acting[path] and not isinstance(adapter.method, Static):
                why = "acts on what the model reads" if adapter.site.kind == "model" else "depends on the input"
                problems.append(f"{path}: {adapter.method.name} {why}, so no single weight equals it; keep it attached")
    return problems


def tied_weights(layers: Iterable[str], shared: Mapping[str, list[str]]) -> list[str]:
    """Return what speaks against layers whose weight other modules hold too."""
    return [
        f"{path}: its weight is tied to {', '.join(shared[path])}, which would change too"
        for path in layers
        if path in shared
    ]
