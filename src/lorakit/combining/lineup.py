"""Adapters lined up: which of them changes which weight, and every reason why they cannot become one.

A weight that an adapter does not change is changed by 0 there. Where one adapter changes a whole fused layer and
another some of its rows, the rows are raised to the whole, for rows of one adapter do not overlap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations, pairwise

import torch
from torch import Tensor

from lorakit.combining.change import change_of, raised
from lorakit.combining.how import Term
from lorakit.core.as_lora import refuse_unknown_widths
from lorakit.core.method import Static
from lorakit.core.site import Site
from lorakit.core.state import AdapterState, Update, check_tensors, expect_adapter, trim
from lorakit.errors import AdapterFileError, CombineError, SpecError, grouped, listing


@dataclass(frozen=True, eq=False)
class Place:
    """One weight, and the updates of it, each with the weight of its adapter."""

    site: Site
    parts: tuple[tuple[float, Update], ...]

    @property
    def kept_in(self) -> torch.dtype:
        """Return the widest dtype of the updates' tensors."""
        found = [tensor.dtype for _, update in self.parts for tensor in update.tensors.values()]
        return reduce(torch.promote_types, found)

    @property
    def dtype(self) -> torch.dtype:
        """Return what a sum of the updates is kept in: fp32 or wider."""
        return torch.promote_types(self.kept_in, torch.float32)

    @property
    def device(self) -> torch.device:
        """Return where the first update is kept."""
        return next(iter(self.parts[0][1].tensors.values())).device

    def terms(self, base: Mapping[str, Tensor]) -> list[Term]:
        """Return the changes with their weights, or raise `CombineError` where one asks for a weight not given."""
        found = []
        for weight, update in self.parts:
            change = change_of(update, _own_weight(update.site, base))
            if change is None:
                raise CombineError(
                    f"{update.method.name}'s change of this weight depends on the weight; give it, base={{key: weight}}"
                )
            if update.site.rows is not None and self.site.rows is None:
                change = raised(change, update.site.rows, self.site.out)
            found.append(Term(weight, change, float(getattr(update.method, "scale", 1.0))))
        return found


def lineup(states: Sequence[AdapterState], weights: Sequence[float]) -> list[Place]:
    """Return every weight that an adapter of a weight other than 0 changes, in the order of the adapters.

    Raises:
        CombineError: adapters of other bases or classes, updates that are no change of a weight, tensors that do not
            fit, shapes that differ; all of a kind at once.
    """
    _refuse_other_bases(states)
    _refuse_unfit(states)
    by_path: dict[str, list[tuple[float, Update]]] = {}
    for state, weight in zip(states, weights, strict=True):
        for update in trim(state).updates if weight else ():
            by_path.setdefault(update.site.path, []).append((weight, update))
    places, problems = [], []
    for path, parts in by_path.items():
        try:
            places += _places(parts)
        except CombineError as problem:
            problems.append(f"{path}: {problem}")
    if problems:
        raise CombineError(f"{len(problems)} layer(s) do not line up:\n{listing(grouped(problems))}")
    return places


def checked_weights(states: Sequence[AdapterState], weights: Sequence[float] | None) -> list[float]:
    """Return one finite weight an adapter, 1 each unless given; not all of them 0."""
    if not states:
        raise CombineError("there is nothing to combine; give at least one adapter")
    for state in states:
        expect_adapter(state)
    if weights is None:
        return [1.0] * len(states)
    if len(weights) != len(states):
        raise CombineError(f"{len(weights)} weights for {len(states)} adapters; give one for each")
    if bad := [w for w in weights if isinstance(w, bool) or not isinstance(w, int | float) or not math.isfinite(w)]:
        raise CombineError(f"weights must be finite numbers, not {bad[0]!r}")
    if not any(weights):
        raise CombineError("every weight is 0, so nothing would be left; detach the adapters instead")
    return [float(w) for w in weights]


def _refuse_other_bases(states: Sequence[AdapterState]) -> None:
    """Raise `CombineError` where two adapters remember other weights of their base, or other names and no weights."""
    labelled = {state.labels for state in states if state.labels}
    if len(labelled) > 1:
        shown = " and ".join(", ".join(labels) for labels in sorted(labelled))
        raise CombineError(f"these classify into other classes, so their heads do not add up: {shown}")
    for (i, one), (j, other) in combinations(enumerate((s.base for s in states), 1), 2):
        if paths := one.unlike(other):
            raise CombineError(
                f"adapters {i} ({one.name or 'unnamed'}) and {j} ({other.name or 'unnamed'}) were trained on bases "
                f"whose weights differ, so their changes do not add up; take adapters of one base:\n{listing(paths, 4)}"
            )
        known = one.name and other.name and one.name != other.name
        if known and not one.probes.keys() & other.probes.keys():
            raise CombineError(
                f"adapters {i} and {j} name other bases, {one.name} and {other.name}, and remember no weights to tell "
                "whether they are one; if they are, say so: replace(state, base=other.base)"
            )


def _refuse_unfit(states: Sequence[AdapterState]) -> None:
    """Raise `CombineError` listing what has no change to add, and tensors that do not fit or are not finite."""
    problems = []
    for i, state in enumerate(states, 1):
        of = f"adapter {i}" if len(states) > 1 else "the adapter"
        moving = [f"{u.site.key}: {u.method.name}" for u in state.updates if not isinstance(u.method, Static)]
        if moving:
            way = "; attach the adapters together and weigh them with use()" if len(states) > 1 else ""
            problems.append(
                f"{of} has {len(moving)} update(s) that depend on the input and are no change of a weight{way}:\n"
                f"{listing(grouped(moving))}"
            )
            continue
        try:
            refuse_unknown_widths(state)
            check_tensors(state.updates)
        except (SpecError, AdapterFileError) as problem:
            problems.append(f"{of}: {problem}")
        if bad := [name for name, tensor in state.trained.items() if not tensor.isfinite().all()]:
            problems.append(f"{of}: tensors trained whole hold NaN or infinity:\n{listing(bad)}")
    if problems:
        raise CombineError("\n".join(problems))


def _places(parts: list[tuple[float, Update]]) -> list[Place]:
    """Return the places of one layer: each of its row slices, or the whole where slices of adapters overlap."""
    spans = sorted({u.site.rows or (0, u.site.out) for _, u in parts})
    if any(a[1] > b[0] for a, b in pairwise(spans)):
        return [Place(_whole_site([u.site for _, u in parts]), tuple(parts))]
    by_rows: dict[tuple[int, int] | None, list[tuple[float, Update]]] = {}
    for weight, update in parts:
        by_rows.setdefault(update.site.rows, []).append((weight, update))
    return [Place(_one_site([u.site for _, u in same]), tuple(same)) for same in by_rows.values()]


def _whole_site(sites: Sequence[Site]) -> Site:
    """Return the site of the whole layer that all of these are, or are rows of."""
    if any(site.rows is not None and (site.fused_out is None or site.groups > 1) for site in sites):
        raise CombineError("rows that overlap, of a layer whose height they do not tell or that has groups")
    return _one_site([replace(site, out=site.height, rows=None, fused_out=None) for site in sites])


def _one_site(sites: Sequence[Site]) -> Site:
    """Return the site that all of these are; what one of them calls linear, as PEFT's files do, may be transposed."""
    if len(shapes := {(site.shape, site.groups, site.height) for site in sites}) > 1:
        shown = " and ".join(str(shape) for shape, _, _ in sorted(shapes))
        raise CombineError(f"weights of other shapes, {shown}; combine adapters of one base")
    kinds = {site.kind for site in sites}
    if len(kinds) > 1 and kinds != {"linear", "transposed-linear"}:
        raise CombineError(f"layers of other kinds, {' and '.join(sorted(kinds))}; combine adapters of one base")
    kind = "transposed-linear" if len(kinds) > 1 else kinds.pop()
    bias = next((site.bias for site in sites if site.bias is not None), None)
    return replace(sites[0], kind=kind, bias=bias)


def _own_weight(site: Site, base: Mapping[str, Tensor]) -> Tensor | None:
    """Return the base's canonical weight at a site, by the key of the site or cut from its path's."""
    weight = base.get(site.key)
    if weight is None and site.rows is not None and site.path in base:
        weight = base[site.path][site.rows[0] : site.rows[1]]
    if weight is not None and tuple(weight.shape) != site.shape:
        raise CombineError(f"the base's weight is {tuple(weight.shape)}, and the adapter is for {site.shape}")
    return None if weight is None else weight.cpu()
