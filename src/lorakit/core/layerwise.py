"""Layer-wise ranks: less for the lower layers, more for the upper ones, at a stated budget.

A preset of the field without a citation, so it comes with its baseline: `uniform_rank` gives the one rank that costs
the same, and a comparison against it is the only fair one. Bands are shares of the depth (6, 12 and 14 of 32 layers),
rescaled to any depth; alpha moves with the rank, so every layer keeps the method's scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.core.method import LowRank, Method, Stretched
from lorakit.core.site import Site
from lorakit.core.spec import Override, fields_of
from lorakit.errors import SpecError

BANDS = (6 / 32, 18 / 32, 1.0)
"""Upper ends of the lower, middle and upper band, as shares of the depth."""
_SOME = Site("layers.0.linear", 4096, 4096)  # where a method is asked what it shares between layers


@dataclass(frozen=True)
class Profile:
    """One rank for each band."""

    ranks: tuple[int, int, int]

    def by_layer(self, depth: int) -> list[int]:
        """Return the rank of each of `depth` layers."""
        ends = [round(share * depth) for share in BANDS]
        return [next(rank for rank, end in zip(self.ranks, ends, strict=True) if i < end) for i in range(depth)]

    def overrides(self, method: Method, depth: int) -> list[Override]:
        """Return the overrides that give each band its rank, alpha / rank (or alpha / sqrt(rank)) unchanged."""
        ranked = method.inner if isinstance(method, Stretched) else method
        if (
            not isinstance(ranked, LowRank)
            or not {"rank", "alpha"} <= fields_of(ranked).keys()
            or any(decl.shared for decl in ranked.tensors(_SOME).values())
        ):
            raise SpecError(
                f"the layer-wise preset gives each layer a rank and an alpha of its own, which {method.name} cannot "
                "have; remove `layerwise`"
            )
        ranks, usual = self.by_layer(depth), vars(ranked)["alpha"]
        root = 0.5 if getattr(ranked, "stabilised", False) else 1.0
        found = []
        for rank in dict.fromkeys(ranks):
            first, last = ranks.index(rank), len(ranks) - 1 - ranks[::-1].index(rank)
            alpha = usual * (rank / ranked.rank) ** root
            found.append(Override.of("*", layers=f"{first}-{last}", rank=rank, alpha=alpha))
        return found


PROFILES = {"low": Profile((2, 8, 16)), "middle": Profile((3, 12, 40)), "high": Profile((4, 16, 64))}
"""The two ends and the middle of the published ranges 2-4, 8-16 and 16-64."""


def uniform_rank(ranks: Sequence[int]) -> float:
    """Return the uniform rank with the same number of parameters: the mean, where every layer has the same shapes."""
    return sum(ranks) / len(ranks)
