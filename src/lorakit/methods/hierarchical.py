"""Hierarchical LoRA: a pair for the whole model, a pair for each group of layers, and a pair of the layer's own.

`dW_l = s0 B0 A0 + s1 B_g(l) A_g(l) + s2 B_l A_l` with `s_i = alpha / r_i`: weights of one kind and shape share the
first term, and those of them in the same `group_size` neighbouring layers the second. The name has no canonical paper;
this is its layer-nested reading. It is exactly one LoRA of rank `r0 + r1 + r2`, `[B0, B1, B2] [A0; A1; A2]`; a shared
factor's gradient is the sum over its sharers; while the shared levels rest at their start, it is LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lorakit.core.checks import check_whole
from lorakit.core.method import LowRank, Start, Tensors, down_up
from lorakit.core.site import Decl, Site, layer_of
from lorakit.methods.lora import LoRA


@dataclass(frozen=True)
class Hierarchical(LowRank):
    """Add a global, a group's and a leaf LoRA; `rank` is the leaf's, and a group is `group_size` layers."""

    rank: int = 8
    alpha: float = 16.0
    group_rank: int = 4
    global_rank: int = 4
    group_size: int = 4

    name: ClassVar[str] = "hierarchical"
    paper: ClassVar[str] = "LoRA (arXiv 2106.09685) on three levels; no paper of its own"
    formula: ClassVar[str] = "dW = s0 B0 A0 + s1 B_g A_g + s2 B A, s_i = alpha / r_i; the first two pairs shared"
    count: ClassVar[str] = "rank * (m + n)"

    def __post_init__(self) -> None:
        LoRA(self.rank, self.alpha)  # refuses what LoRA refuses
        for name in ("group_rank", "global_rank"):
            check_whole(name, getattr(self, name))
        check_whole("group_size", self.group_size, hint=" layers")

    def check(self, site: Site) -> None:
        """Raise `SpecError` for a level whose rank the weight cannot have."""
        super().check(site)
        for rank in self._ranks().values():
            LoRA(rank).check(site)

    def tensors(self, site: Site) -> dict[str, Decl]:
        """Declare the three pairs; those of the group and the whole are held with the sites that share them."""
        stack, layer = layer_of(site.path) or ("", 0)
        sharers = {"leaf": None, "group": f"{stack}.{layer // self.group_size}", "global": "all"}
        shape = "x".join(map(str, (*site.shape, site.groups)))
        declared = {}
        for level, rank in self._ranks().items():
            for name, decl in down_up(rank, site).items():
                word = sharers[level] and f"{level}.{sharers[level]}.{site.kind}.{shape}.{rank}.{name}"
                declared[f"{level}_{name}"] = replace(decl, shared=word)
        return declared

    def init(self, p: Tensors, start: Start) -> None:
        """Start each level as LoRA starts, the leaf first: with the same seed it is that LoRA's start."""
        for level, rank in self._ranks().items():
            if f"{level}_up" in p:
                LoRA(rank, self.alpha).init({"down": p[f"{level}_down"], "up": p[f"{level}_up"]}, start)

    def factors(self, p: Tensors) -> tuple[Float[Tensor, "r in *kernel"], Float[Tensor, "out rg"]]:
        """Return `[A; A_g; A0]` and `[s B, s1 B_g, s0 B0]`; with groups, each one's rows of A together."""
        ranks = self._ranks()
        groups = self.rank // p["leaf_up"].shape[1]
        downs = [p[f"{level}_down"].reshape(groups, rank // groups, -1) for level, rank in ranks.items()]
        ups = [self.alpha / rank * p[f"{level}_up"] for level, rank in ranks.items()]
        return torch.cat(downs, 1).reshape(-1, *p["leaf_down"].shape[1:]), torch.cat(ups, 1)

    def _ranks(self) -> dict[str, int]:
        return {"leaf": self.rank, "group": self.group_rank, "global": self.global_rank}
