"""The dense weights of a base, read from its files one at a time: LoftQ starts from them, an analysis needs them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorakit.core.site import Site
from lorakit.core.state import Base
from lorakit.errors import RecipeError, listing
from lorakit.inject.bases import probe
from lorakit.inject.sites import sites as sites_of
from lorakit.training.base import Task, build_empty
from lorakit.training.stored_tensors import StoredTensors

LYING = ("transposed-linear", "embedding")
"""Kinds whose modules keep their weight `(in, out)`."""


def canonical(site: Site, stored: Tensor) -> Tensor:
    """Return a layer's weight as a site has it: `(out, in, *kernel)` in fp32, its own rows of a fused one.

    The kind of the site must be its model's: files of other tools call every layer linear.
    """
    weight = stored.to(torch.float32)
    weight = weight.T if site.kind in LYING else weight
    return weight if site.rows is None else weight[site.rows[0] : site.rows[1]]


class DenseWeights(Mapping[str, Tensor]):
    """By the key of a site its weight in canonical layout and fp32, read when it is asked for and not kept."""

    def __init__(
        self, base: str, sites: Sequence[Site], task: Task, labels: Sequence[str], *, reader: str, remedy: str,
        tied: bool = False,
    ) -> None:  # fmt: skip
        """Find where each site's weight lies in the files of `base`.

        Args:
            base: a name or a directory.
            sites: whose weights are asked for.
            task: of the model that the sites are of.
            labels: of its classes.
            reader: who asks, for errors.
            remedy: what to do about a base with packed weights, for errors.
            tied: whether a head without a tensor of its own has that of the embeddings.

        Raises:
            RecipeError: a base whose files are packed, or in which a site has no tensor, or one of another shape.
        """
        model = build_empty(base, task=task, labels=labels)
        kinds = {path: own.kind for path, own in sites_of(model).by_path.items()}
        told = [replace(site, kind=kinds.get(site.path, site.kind)) for site in sites]
        self._base, self._sites = base, {site.key: site for site in told}
        self._stored = StoredTensors(base, model, reader=reader, remedy=remedy)
        own = {key: f"{site.path}.weight" for key, site in self._sites.items()}
        named = {
            key: self._stored.known_as(name) if tied else name if name in self._stored else None
            for key, name in own.items()
        }
        if absent := [key for key, name in named.items() if name is None]:
            raise RecipeError(f"{reader}: {base} has no tensor of its own for\n{listing(absent)}")
        self._named = {key: name for key, name in named.items() if name is not None}
        if wrong := [line for site in told if (line := self._misfit(site)) is not None]:
            raise RecipeError(
                f"{reader}: the adapter was made for another model than {base}; these weights have other shapes:\n"
                f"{listing(wrong)}"
            )

    def __getitem__(self, key: str) -> Tensor:
        return canonical(self._sites[key], self._stored[self._named[key]])

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def _misfit(self, site: Site) -> str | None:
        """Return what is wrong with the shape of a site's weight, or None; a width of 0 is not known."""
        stored = self._stored.shapes[self._named[site.key]]
        here = (stored[1], stored[0]) if site.kind in LYING else stored
        wanted = (site.height, *site.shape[1:])
        if here == wanted or (not site.in_ and here[0] == wanted[0]):
            return None
        return f"{site.key}: {here}, the adapter is for {wanted}"

    def probed(self, paths: Iterable[str]) -> Base:
        """Return the base with its own values at the probes of an adapter, those of its tensors that are here."""
        return probed(self._base, self._stored, paths)


def probed(base: str, stored: Mapping[str, Tensor], paths: Iterable[str]) -> Base:
    """Return a base with values of the weights at these paths, those of its tensors that are stored."""
    here = {path: f"{path}.weight" for path in paths}
    return Base(base, {path: probe(stored[name]) for path, name in here.items() if name in stored})
