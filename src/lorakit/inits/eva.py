"""EVA: start on the directions the layer's inputs vary in most (arXiv 2410.07170).

A holds the r leading right singular vectors of the inputs X, so `A A^T = I` and no rank-r projection keeps more of X;
B = 0. They are the leading eigenvectors of the second moment `X^T X`, which is what is gathered. The inputs are not
centred (section 3; PEFT centres them).

With `rho` above 1 the ranks are shared out anew (section 3.3): of all sites together, the components that explain the
largest share of their own layer's inputs stay, as many as the ranks sum to and at most `rho r` at one site. A site
whose components explain too little gets none, and no adapter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorakit.core.checks import is_number
from lorakit.core.init import Init, Need
from lorakit.core.method import WEIGHT_KINDS, Start
from lorakit.core.site import Site
from lorakit.errors import SpecError


@dataclass(frozen=True)
class Eva(Init):
    """Start at dW = 0 with the r leading right singular vectors of the layer's inputs as the rows of A."""

    rho: float = 1.0
    """The most a site's rank may grow by when ranks are shared out; 1 keeps them, the paper also takes 2."""

    name: ClassVar[str] = "eva"
    paper: ClassVar[str] = "arXiv 2410.07170"
    needs: ClassVar[Need | None] = "inputs"
    kinds: ClassVar[frozenset[str]] = WEIGHT_KINDS - {"embedding"}  # the inputs of a table are row numbers

    def __post_init__(self) -> None:
        if not (is_number(self.rho) and self.rho >= 1):
            raise SpecError(f"rho must be a number from 1, not {self.rho!r}; 1 keeps every rank, 2 is usual")

    def fill(self, down: Tensor, up: Tensor, scale: float, start: Start) -> None:
        """Take the eigenvectors of the largest eigenvalues, the largest first."""
        assert start.evidence is not None
        n = start.site.fan_in
        wide = torch.promote_types(start.evidence.dtype, torch.float32)
        moment = start.evidence.reshape(-1, n, n).to(start.weight.device, wide)
        vectors = torch.linalg.eigh(moment).eigenvectors  # columns, the smallest first
        down.copy_(vectors.flip(-1)[..., : up.shape[1]].mT.reshape(down.shape))
        nn.init.zeros_(up)

    def ranks(self, sites: Sequence[Site], ranks: Sequence[int], evidence: Sequence[Tensor]) -> Sequence[int]:
        """Keep the components of the largest `lambda_j / sum(lambda)`, as many as before; a grouped one its rank."""
        if self.rho == 1:
            return ranks
        shared = [i for i, site in enumerate(sites) if site.groups == 1]
        pool: list[tuple[float, int]] = []
        for i in shared:
            values = torch.linalg.eigvalsh(evidence[i].double()).flip(-1).clamp_min(0)
            most = min(int(self.rho * ranks[i]), sites[i].max_rank)
            pool += [(float(v), i) for v in values[:most] / values.sum().clamp_min(torch.finfo(values.dtype).tiny)]
        pool.sort(key=lambda component: -component[0])  # stable: of equals the first site's stay
        kept = Counter(i for _, i in pool[: sum(ranks[i] for i in shared)])
        return [kept[i] if i in shared else rank for i, rank in enumerate(ranks)]
