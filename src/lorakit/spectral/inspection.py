"""All that is known of an adapter, module by module: each update and each weight is looked at once and let go.

Without a base: spectra, effective ranks, the rank that holds most of an update. With its base: how large an update is
beside its weight, what it amplifies (the LoRA paper's table 7), whether it repeats it, and intruder dimensions. With
another adapter of the base: how alike the subspaces are, and what the two do to each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.core.state import AdapterState, Update
from lorakit.errors import SpecError, grouped, listing
from lorakit.spectral.amplification import Projections, amplification, correlation
from lorakit.spectral.interference import Interference, interference
from lorakit.spectral.intruder import TOP, Intruders, intruders
from lorakit.spectral.spectrum import Spectrum, refuse_unfit, spectrum_of, weight_of
from lorakit.spectral.subspace import similarities
from lorakit.spectral.svd import Svd, matrix_view, svd

ENERGY = 0.9
"""The share of an update's energy that the rank proposed for it holds."""
ITERATIONS, DECAY = 8, 64
"""Of the randomised SVD that finds a weight's own leading directions; how many of its singular values are told."""
GRID = 32
"""How many directions of either adapter a similarity is told of: the first ones are what an update is."""


@dataclass(frozen=True)
class Module:
    """What is known of one update; what was not asked for, or does not exist for an update of 0, is None.

    `needs` is the lowest rank that holds the asked share of its energy, and `projections` are those of as many
    directions: what lies behind them is small, and would hide what they do. `grid[i][j]` is the similarity of the input
    directions up to i and j of the two adapters (figures 3 and 4 of arXiv 2106.09685).
    """

    spectrum: Spectrum
    needs: int
    projections: Projections | None = None
    correlation: float | None = None
    intruders: int | None = None
    met: Interference | None = None
    grid: tuple[tuple[float, ...], ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        held = self.projections
        return {
            **self.spectrum.to_json(),
            "needs": self.needs,
            "amplification": None if held is None else {**held.__dict__, "factor": held.factor},
            "correlation": self.correlation,
            "intruders": self.intruders,
            "interference": None if self.met is None else self.met.to_json(),
            "similarity": self.grid,
        }


@dataclass(frozen=True)
class Inspection:
    """The modules of an adapter, and those where only one of two adapters has an update."""

    modules: tuple[Module, ...]
    energy: float = ENERGY
    only_first: tuple[str, ...] = ()
    only_second: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "energy": self.energy,
            "modules": [module.to_json() for module in self.modules],
            "only_first": list(self.only_first),
            "only_second": list(self.only_second),
        }


@torch.no_grad()
def inspect(
    state: AdapterState,
    base: Mapping[str, Tensor] | None = None,
    against: AdapterState | None = None,
    *,
    energy: float = ENERGY,
    count_intruders: bool = False,
) -> Inspection:
    """Return what an adapter learned, one row a module, in its order.

    Args:
        state: an adapter of static updates.
        base: its base's canonical weights by key of their site; each is asked for once.
        against: another adapter of the same base.
        energy: the share of an update's energy that decides which rank it needs, above 0 and at most 1.
        count_intruders: with a base, also look for intruder dimensions: two dense SVDs for each weight.

    Raises:
        SpecError: updates that are no change of a weight, that need a weight which is not given, or whose weight has
            another shape; adapters of different bases; each lists every module.
        AdapterFileError: tensors with NaN or infinity, missing, or of a wrong shape, all of them.
    """
    for given in (state,) if against is None else (state, against):
        refuse_unfit(given)
    others = {} if against is None else {update.site.key: update for update in against.updates}
    if against is not None:
        _refuse_other_base(state, against)
    modules, problems = [], []
    for update in state.updates:
        try:
            modules.append(_module(
                update, None if base is None else weight_of(base, update.site), others.get(update.site.key), energy,
                count_intruders,
            ))  # fmt: skip
        except SpecError as error:
            problems.append(f"{update.site.key}: {error}")
    if problems:
        raise SpecError(f"{len(problems)} update(s) cannot be looked at:\n{listing(grouped(problems))}")
    keys = {module.spectrum.key for module in modules}
    alone = () if against is None else tuple(key for key in keys if key not in others)
    return Inspection(tuple(modules), energy, tuple(sorted(alone)), tuple(sorted(others.keys() - keys)))


def _module(
    update: Update, weight: Tensor | None, other: Update | None, energy: float, count_intruders: bool
) -> Module:
    own = svd(update, weight)
    row = spectrum_of(update, own.s, weight)
    needs = row.rank_at(energy)
    projections, along, found, met, grid = None, None, None, None, None
    if weight is not None and not row.dead:
        matrix = matrix_view(update.site, weight)
        rng = torch.Generator().manual_seed(0)
        projections = amplification(own, matrix, needs, ITERATIONS, rng, values=DECAY)
        along = correlation(own, matrix)
        if count_intruders:
            found = _intruders(matrix, own).count
    if other is not None:
        theirs = svd(other, weight)
        if own.rank and theirs.rank:
            met = interference(own, theirs)
            grid = _grid(own, theirs)
    return Module(row, needs, projections, along, found, met, grid)


def _intruders(matrix: Tensor, own: Svd) -> Intruders:
    delta = (own.u * own.s) @ own.vh
    return intruders(matrix, delta.to(matrix), top=min(TOP, *matrix.shape))


def _grid(first: Svd, second: Svd) -> tuple[tuple[float, ...], ...]:
    ours, theirs = (one.leading(min(one.rank, GRID))[1] for one in (first, second))
    grid = similarities(ours, theirs)
    return tuple(tuple(row) for row in grid.tolist())


def _refuse_other_base(state: AdapterState, against: AdapterState) -> None:
    """Raise `SpecError` for adapters whose bases differ where both remember a weight, or whose layers do."""
    weights = [f"{path}: another weight" for path in state.base.unlike(against.base)]
    sites = {update.site.key: update.site.shape for update in state.updates}
    shapes = [
        f"{u.site.key}: {sites[u.site.key]} and {u.site.shape}"
        for u in against.updates
        if u.site.key in sites and sites[u.site.key] != u.site.shape
    ]
    if found := weights + shapes:
        raise SpecError(f"the adapters sit on different bases, so they cannot be compared:\n{listing(grouped(found))}")
    if not any(update.site.key in sites for update in against.updates):
        raise SpecError("the adapters have no layer in common, so there is nothing to compare")
