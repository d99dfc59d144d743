"""PiSSA: start on the principal part of the weight, so that what matters most is what learns (arXiv 2404.02948).

`W = U S V^T`, `B0 = U_r S_r^(1/2) / sqrt(s)`, `A0 = S_r^(1/2) V_r^T / sqrt(s)` (eq. 2 and 3, with the update's scale
s), so `s B0 A0` is the best rank-r approximation of W. The paper freezes `W - s B0 A0`; here the base stays and the
pair subtracts its start, which is the same function and leaves an adapter that fits the untouched base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorakit.core.init import Init, by_group, check_iterations, leading
from lorakit.core.method import Start


@dataclass(frozen=True)
class Pissa(Init):
    """Start on the r largest singular triplets of W; `iterations` of a randomised SVD (16 is usual), exact without."""

    iterations: int | None = None

    name: ClassVar[str] = "pissa"
    paper: ClassVar[str] = "arXiv 2404.02948"
    starts_at_zero: ClassVar[bool] = False
    keeps_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_iterations(self.iterations)

    def fill(self, down: Tensor, up: Tensor, scale: float, start: Start) -> None:
        """Split the principal part of W evenly between the factors."""
        rank = up.shape[1]
        u, s, vh = leading(by_group(start.site, start.weight), rank, self.iterations, start.rng)
        root = (s / scale).sqrt()
        up.copy_((u * root.unsqueeze(-2)).reshape(up.shape))
        down.copy_((root.unsqueeze(-1) * vh).reshape(down.shape))
