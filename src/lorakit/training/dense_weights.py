"""The dense weights of a base that is loaded in 4 bits, read from its files one at a time: what LoftQ starts from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lorakit.core.site import Site
from lorakit.errors import RecipeError
from lorakit.training.base import Task, build_empty
from lorakit.training.base_files import open_tensors, place_of
from lorakit.training.quantised import settings_of
from lorakit.training.tensor_names import checkpoint_of


class DenseWeights(Mapping[str, Tensor]):
    """By the key of a site its weight in canonical layout and fp32, read when it is asked for and not kept."""

    def __init__(self, base: str, sites: Sequence[Site], task: Task, labels: Sequence[str]) -> None:
        """Find where each site's weight lies in the files of `base`.

        Raises:
            RecipeError: a base whose files are packed, or in which a site has no tensor of its own.
        """
        self._place, self._sites = place_of(base), {site.key: site for site in sites}
        model = build_empty(base, task=task, labels=labels)
        if settings_of(model.config) is not None:
            raise RecipeError(
                f"init loftq starts from the dense weights, and {base} holds packed ones; set model to the base it was "
                "made of, and quant to how to pack it"
            )
        with open_tensors(self._place) as stored:
            sources = checkpoint_of(model, stored).sources
        self._names = {key: sources.get(f"{site.path}.weight", []) for key, site in self._sites.items()}
        if absent := [key for key, names in self._names.items() if len(names) != 1]:
            raise RecipeError(f"init loftq: {base} has no tensor of its own for {', '.join(absent[:4])}; exclude them")

    def __getitem__(self, key: str) -> Tensor:
        site, (name,) = self._sites[key], self._names[key]
        with open_tensors(self._place) as stored:
            weight = stored[name][...].to(torch.float32)
        weight = weight.T if site.kind == "transposed-linear" else weight
        return weight if site.rows is None else weight[site.rows[0] : site.rows[1]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)
