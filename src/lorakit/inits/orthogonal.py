"""Orthogonal: both factors random, yet their product 0 (datta0.github.io/posts/rethink-lora-init).

With the rows of a random orthogonal `Q (r, r)` dealt out in turn, `A = Q_1^T X_1 / 10` and `B = X_2 Q_2 / 10` for
Gaussian `X_1 (r/2, n)` and `X_2 (m, r/2)`, so `B A = X_2 Q_2 Q_1^T X_1 / 100 = 0`, to rounding. Both factors learn from
the first step on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorakit.core.init import Init, by_group
from lorakit.core.method import Start
from lorakit.core.site import Site
from lorakit.errors import SpecError


@dataclass(frozen=True)
class Orthogonal(Init):
    """Start at dW = 0, to rounding, with two random factors: A's columns are orthogonal to B's rows."""

    name: ClassVar[str] = "orthogonal"
    paper: ClassVar[str] = "datta0.github.io/posts/rethink-lora-init"

    def check(self, rank: int, site: Site) -> None:
        """Raise `SpecError` for a rank without two halves."""
        super().check(rank, site)
        if rank // site.groups % 2:
            each = f" in each of {site.groups} groups" if site.groups > 1 else ""
            raise SpecError(
                f"init orthogonal halves the rank{each}, and {rank // site.groups} is odd; "
                f"use rank {rank + site.groups} or exclude this path"
            )

    def fill(self, down: Tensor, up: Tensor, scale: float, start: Start) -> None:
        """Draw Q and both X; in fp64, so that the product is as close to 0 as the factors' dtype allows."""
        a, b = by_group(start.site, down), by_group(start.site, up)
        (groups, rank, n), m = a.shape, b.shape[1]

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=start.rng, dtype=torch.float64)

        q = torch.linalg.qr(drawn(groups, rank, rank)).Q
        a.copy_(q[:, 0::2].mT @ drawn(groups, rank // 2, n) / 10)
        b.copy_(drawn(groups, m, rank // 2) @ q[:, 1::2] / 10)
