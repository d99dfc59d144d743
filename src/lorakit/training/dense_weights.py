"""The dense weights of a base, read from its files one at a time: LoftQ starts from them, an analysis needs them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lorakit.core.site import Site
from lorakit.core.state import Base
from lorakit.errors import RecipeError, listing
from lorakit.inject.attach import probe
from lorakit.training.base import Task, build_empty
from lorakit.training.base_files import open_tensors, place_of
from lorakit.training.quantised import settings_of
from lorakit.training.tensor_names import checkpoint_of

LYING = ("transposed-linear", "embedding")
"""Kinds whose modules keep their weight `(in, out)`."""


class DenseWeights(Mapping[str, Tensor]):
    """By the key of a site its weight in canonical layout and fp32, read when it is asked for and not kept."""

    def __init__(
        self, base: str, sites: Sequence[Site], task: Task, labels: Sequence[str], *, reader: str, remedy: str
    ) -> None:
        """Find where each site's weight lies in the files of `base`.

        Args:
            base: a name or a directory.
            sites: whose weights are asked for.
            task: of the model that the sites are of.
            labels: of its classes.
            reader: who asks, for errors.
            remedy: what to do about a base with packed weights, for errors.

        Raises:
            RecipeError: a base whose files are packed, or in which a site has no tensor of its own.
        """
        self._base, self._place, self._sites = base, place_of(base), {site.key: site for site in sites}
        model = build_empty(base, task=task, labels=labels)
        if settings_of(model.config) is not None:
            raise RecipeError(f"{reader} reads dense weights, and {base} holds packed ones; {remedy}")
        with open_tensors(self._place) as stored:
            sources = checkpoint_of(model, stored).sources
        self._names = {path: names[0] for path, names in sources.items() if len(names) == 1}
        if absent := [key for key, site in self._sites.items() if f"{site.path}.weight" not in self._names]:
            raise RecipeError(f"{reader}: {base} has no tensor of its own for\n{listing(absent)}")

    def __getitem__(self, key: str) -> Tensor:
        site = self._sites[key]
        weight = self._read(site.path).to(torch.float32)
        weight = weight.T if site.kind in LYING else weight
        return weight if site.rows is None else weight[site.rows[0] : site.rows[1]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def probed(self, paths: Iterable[str]) -> Base:
        """Return the base with its own values at the probes of an adapter, those of its tensors that are here."""
        return Base(self._base, {path: probe(self._read(path)) for path in paths if f"{path}.weight" in self._names})

    def _read(self, path: str) -> Tensor:
        with open_tensors(self._place) as stored:
            return stored[self._names[f"{path}.weight"]][...]
