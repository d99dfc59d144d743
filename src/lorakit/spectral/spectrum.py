"""The spectrum of an adapter: for every module, how large its update is and how many directions it uses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lorakit.core.as_lora import refuse_unknown_widths
from lorakit.core.method import Static
from lorakit.core.site import Site
from lorakit.core.state import AdapterState, Update, check_tensors, expect_adapter
from lorakit.errors import SpecError, grouped, listing
from lorakit.spectral.rank import EFFECTIVE_RANKS, SATURATED, energy, is_dead, is_saturated, numerical_rank, rank_at
from lorakit.spectral.svd import singular_values


@dataclass(frozen=True)
class Spectrum:
    """One update: the singular values of its dW as an `(m, n)` matrix, largest first, as many as it could use.

    `rank` of them are not 0 to rounding. `weight_norm` is |W|_F, None where no base was given.
    """

    key: str
    method: str
    shape: tuple[int, int]
    singular_values: tuple[float, ...]
    rank: int
    weight_norm: float | None = None

    @property
    def norm(self) -> float:
        """Return `|dW|_F = sqrt(sum sigma^2)`."""
        return math.hypot(*self.singular_values)

    @property
    def norm_ratio(self) -> float | None:
        """Return `|dW|_F / |W|_F`, None without a base or beside a weight of 0."""
        return self.norm / self.weight_norm if self.weight_norm else None

    @cached_property
    def energy(self) -> tuple[float, ...]:
        """Return the share of `|dW|_F^2` that the first 1, 2, ... directions hold."""
        return tuple(energy(self._sigma).tolist())

    @cached_property
    def effective_ranks(self) -> dict[str, float]:
        """Return the four effective ranks by name (`EFFECTIVE_RANKS`)."""
        return {name: rank(self._sigma) for name, rank in EFFECTIVE_RANKS.items()}

    def rank_at(self, share: float = 0.9) -> int:
        """Return how many directions hold that share of the energy."""
        return rank_at(self._sigma, share)

    @property
    def dead(self) -> bool:
        """Return whether the update is exactly 0."""
        return is_dead(self._sigma)

    def saturated(self, share: float = SATURATED) -> bool:
        """Return whether the update spreads over nearly all directions it has (`is_saturated`)."""
        return is_saturated(self._sigma, share)

    def to_json(self) -> dict[str, Any]:
        """Return everything above as plain values."""
        return {
            "key": self.key,
            "method": self.method,
            "shape": list(self.shape),
            "singular_values": list(self.singular_values),
            "rank": self.rank,
            "energy": list(self.energy),
            "effective_ranks": self.effective_ranks,
            "norm": self.norm,
            "weight_norm": self.weight_norm,
            "norm_ratio": self.norm_ratio,
            "dead": self.dead,
            "saturated": self.saturated(),
        }

    @property
    def _sigma(self) -> Tensor:
        return torch.tensor(self.singular_values, dtype=torch.float64)


@dataclass(frozen=True)
class Spectra:
    """The spectra of all updates of an adapter, in its order."""

    modules: tuple[Spectrum, ...]

    def __iter__(self) -> Iterator[Spectrum]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    @cached_property
    def by_key(self) -> dict[str, Spectrum]:
        """Return the spectra by the key of their site."""
        return {module.key: module for module in self.modules}

    @property
    def dead(self) -> tuple[str, ...]:
        """Return the keys of updates that are exactly 0."""
        return tuple(module.key for module in self.modules if module.dead)

    def saturated(self, share: float = SATURATED) -> tuple[str, ...]:
        """Return the keys of updates that spread over nearly all directions they have."""
        return tuple(module.key for module in self.modules if module.saturated(share))

    def to_json(self) -> dict[str, Any]:
        """Return `{"modules": [...]}` of plain values."""
        return {"modules": [module.to_json() for module in self.modules]}


@torch.no_grad()
def spectrum(state: AdapterState, base: Mapping[str, Tensor] | None = None) -> Spectra:
    """Return the singular values of every update of an adapter, and what they say, one row a module.

    An update with factors is never multiplied out: 4096 x 4096 of rank 16 takes milliseconds. Others need the dense SVD
    of dW. What of the base was trained whole beside the updates is no update and has no row.

    Args:
        state: an adapter of static updates.
        base: the base's canonical weights by key of their site, read one at a time, for the norms of the weights and
            for a dW that depends on its weight (DoRA, IA3).

    Raises:
        SpecError: updates that are no change of a weight; a dW that needs a weight which is not given; a base that
            lacks a weight, or has one of another shape or with NaN in it. Each lists every module.
        AdapterFileError: tensors with NaN or infinity, missing, or of a wrong shape, all of them.
    """
    refuse_unfit(state)
    modules, problems = [], []
    for update in state.updates:
        try:
            modules.append(_row(update, None if base is None else weight_of(base, update.site)))
        except SpecError as error:
            problems.append(f"{update.site.key}: {error}")
    if problems:
        raise SpecError(f"the weights of {len(problems)} update(s) are missing or do not fit:\n{_lines(problems)}")
    return Spectra(tuple(modules))


def _row(update: Update, weight: Tensor | None) -> Spectrum:
    return spectrum_of(update, singular_values(update, weight), weight)


def spectrum_of(update: Update, sigma: Tensor, weight: Tensor | None) -> Spectrum:
    """Return the row of one update with these singular values, beside its weight where that is known."""
    site = update.site
    shape = (site.out, site.fan_in * site.groups)
    norm = None if weight is None else float(weight.to(torch.promote_types(weight.dtype, torch.float32)).norm())
    return Spectrum(site.key, update.method.name, shape, tuple(sigma.tolist()), numerical_rank(sigma, *shape), norm)


def weight_of(base: Mapping[str, Tensor], site: Site) -> Tensor:
    """Return the weight of a site, or raise `SpecError` for one that is missing, misshaped or not finite."""
    try:
        weight = base[site.key]  # asked for once: it may be read from a file
    except KeyError:
        raise SpecError("the base has no weight of this name; give it by the key of its site") from None
    if tuple(weight.shape) != site.shape:
        raise SpecError(f"the base's weight is {tuple(weight.shape)}, expected {site.shape} (canonical layout)")
    if not weight.isfinite().all():
        raise SpecError("the base's weight holds NaN or infinity")
    return weight


def refuse_unfit(state: AdapterState) -> None:
    """Raise for what has no spectrum: `SpecError`, or `AdapterFileError` for tensors that do not fit; all of a kind."""
    expect_adapter(state)
    moving = [
        f"{u.site.key}: {u.method.name} "
        + ("acts on what the model reads, not on a weight" if u.site.kind == "model" else "depends on the input")
        for u in state.updates
        if not isinstance(u.method, Static)
    ]
    if moving:
        raise SpecError(
            f"{len(moving)} update(s) are no change of a weight, so they have no spectrum:\n{_lines(moving)}"
        )
    refuse_unknown_widths(state)
    check_tensors(state.updates)


def _lines(problems: list[str]) -> str:
    return listing(grouped(problems))
