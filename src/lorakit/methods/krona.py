"""KronA: an update that is the Kronecker product of two small trained matrices.

`dW = s (A kron B)` with `A (a1, a2)`, `B (b1, b2)`, `m = a1 b1`, `n = a2 b2` (arXiv 2212.10650). Neither factor is of
low rank, nor is the product: `rank(dW) = rank(A) rank(B)`. One factor starts at 0; s is a constant the paper searches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lorakit.core.checks import check_positive, check_whole
from lorakit.core.method import Call, Start, Static, Tensors
from lorakit.core.site import Decl, Role, Site
from lorakit.errors import SpecError
from lorakit.methods.kronecker import kron_branch, kron_like


@dataclass(frozen=True)
class KronA(Static):
    """Add `s (A kron B)`, A of the shape `(a1, a2)` given here, B of what is left of the layer's."""

    a1: int = 32
    a2: int = 32
    scale: float = 1.0

    name: ClassVar[str] = "krona"
    paper: ClassVar[str] = "arXiv 2212.10650"
    formula: ClassVar[str] = "dW = s (A kron B), A (a1, a2), B (m / a1, n / a2)"
    count: ClassVar[str] = "a1 * a2 + (m // a1) * (n // a2)"

    def __post_init__(self) -> None:
        for name in ("a1", "a2"):
            check_whole(name, getattr(self, name))
        check_positive("scale", self.scale, hint="; 1 is the usual start of a search")

    def check(self, site: Site) -> None:
        """Raise `SpecError` for a shape of A that does not divide the layer's."""
        super().check(site)
        for name, side, width in (("a1", "outputs", site.out), ("a2", "inputs", site.in_)):
            size = getattr(self, name)
            if width % size:
                below = max(d for d in range(1, min(size, width) + 1) if width % d == 0)
                raise SpecError(
                    f"{name} = {size} does not divide the layer's {width} {side}; use {name} = {below}, "
                    "give this path an override, or exclude it"
                )

    def tensors(self, site: Site) -> dict[str, Decl]:
        """Declare A and B; B carries the kernel of a convolution, and starts at 0 as LoRA's."""
        return {
            "a": Decl((self.a1, self.a2), Role.DOWN),
            "b": Decl((site.out // self.a1, site.in_ // self.a2, *site.kernel), Role.UP),
        }

    def init(self, p: Tensors, start: Start) -> None:
        """Start at dW = 0: A ~ U(-1/sqrt(a2), 1/sqrt(a2)), B = 0."""
        nn.init.kaiming_uniform_(p["a"], a=math.sqrt(5), generator=start.rng)
        nn.init.zeros_(p["b"])

    def delta(self, p: Tensors, weight: Tensor) -> Tensor:
        """Return `s (A kron B)`."""
        return kron_like(weight, self.scale * p["a"], p["b"])

    def branch(self, p: Tensors, call: Call) -> Tensor:
        """Return `s vec(A X B^T)`; dW is formed for convolutions and embeddings alone."""
        return kron_branch(call, self.scale * p["a"], p["b"])
