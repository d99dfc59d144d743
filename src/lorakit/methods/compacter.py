"""Compacter: bottleneck adapters whose projections are sums of Kronecker products with rules all layers share.

`W = sum_i R_i kron (S_i T_i)` of shape (k, d) with R_i (n, n) shared, S_i (k/n, rho), T_i (rho, d/n), and `x W + b` in
place of each dense projection (arXiv 2106.04647; parameterised hypercomplex multiplication). W has rank
n^2 rho at most, costs rho (k + d) values and is never formed: R, S and T act on x one after the other.

Start: S and T are drawn as in the authors' code (Glorot uniform, gain sqrt 2), but T of the projection up is 0, so that
the first forward is the base's to the bit. The rules then have standard deviation 1/n, not 1e-4: rules that small are
the authors' way to start near 0, and beside an exact 0 their square scales T's first gradient down to Adam's eps.
The package `adapters` 1.3 has gelu for the authors' gelu_new, and tests its choice of Glorot as a truth value, so that
it always draws from the normal one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorakit.core.checks import check_whole
from lorakit.core.method import Start, Tensors
from lorakit.core.site import Decl, Role, Site
from lorakit.errors import SpecError
from lorakit.methods.bottleneck import ACTIVATIONS, Bottleneck


@dataclass(frozen=True)
class TwoKroneckerSums(Bottleneck):
    """A bottleneck of two projections with biases, each a sum of `terms` Kronecker products."""

    reduction: float = 32
    activation: str = "gelu_new"
    terms: int = 4
    rank: int = 1

    paper: ClassVar[str] = "arXiv 2106.04647"
    formula: ClassVar[str] = "h <- h + f(h W_down + b1) W_up + b2, each W = sum_i R_i kron (S_i T_i), R shared"
    count: ClassVar[str] = "(2 * rank + 1) * (m + round(m / reduction))"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, what in (("terms", "the paper's n"), ("rank", "rho, of each S T")):
            check_whole(f"{name} ({what})", getattr(self, name))

    def check(self, site: Site) -> None:
        """Raise `SpecError` where n does not divide the features and the bottleneck, with every n that does."""
        super().check(site)
        common = math.gcd(site.out, self.width(site))
        if common % self.terms:
            fit = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise SpecError(
                f"terms {self.terms} does not divide both the {site.out} features and the bottleneck of "
                f"{self.width(site)}; these do: {fit}; or change the reduction"
            )

    def tensors(self, site: Site) -> dict[str, Decl]:
        """Declare 2 rho (d + r) + r + d values, and n^3 that all layers share."""
        n, r = self.terms, self.width(site)
        left, right = (n, site.out // n, self.rank), (n, self.rank, r // n)
        return {
            "rules": Decl((n, n, n), Role.BANK, shared=f"{n} rules"),
            "down_left": Decl(left, Role.DOWN),
            "down_right": Decl(right, Role.DOWN),
            "down_bias": Decl((r,), Role.DOWN),
            "up_left": Decl((n, r // n, self.rank), Role.UP),
            "up_right": Decl((n, self.rank, site.out // n), Role.UP),
            "up_bias": Decl((site.out,), Role.UP),
        }

    def init(self, p: Tensors, start: Start) -> None:
        """Start at 0: R normal of deviation 1/n, S and T Glorot uniform of gain sqrt 2, T of W_up and the biases 0."""
        for name, values in p.items():
            if name == "rules":
                nn.init.normal_(values, std=1 / self.terms, generator=start.rng)
            elif name in ("down_left", "down_right", "up_left"):
                for each in values:
                    nn.init.xavier_uniform_(each, gain=math.sqrt(2), generator=start.rng)
            else:
                nn.init.zeros_(values)

    def through(self, p: Tensors, h: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Return `f(h W_down + b1) W_up + b2`."""
        narrow = product(h, p["rules"], p["down_left"], p["down_right"]) + p["down_bias"]
        return product(ACTIVATIONS[self.activation](narrow), p["rules"], p["up_left"], p["up_right"]) + p["up_bias"]


@dataclass(frozen=True)
class Compacter(TwoKroneckerSums):
    """Put a bottleneck of Kronecker products behind attention and behind the MLP, and train the norms."""

    name: ClassVar[str] = "compacter"
    targets: ClassVar[Sequence[str]] = ("attention-out", "mlp-out")
    train: ClassVar[Sequence[str]] = "norms"


def product(
    x: Float[Tensor, "... k"],
    rules: Float[Tensor, "n n n"],
    left: Float[Tensor, "n p rho"],
    right: Float[Tensor, "n rho q"],
) -> Float[Tensor, "... d"]:
    """Return `x sum_i kron(R_i, S_i T_i)` for R (n, n, n), S (n, k/n, rho), T (n, rho, d/n), forming none of it."""
    blocks = x.reshape(*x.shape[:-1], rules.shape[1], -1)
    narrow = torch.einsum("...ap,ips->...ais", blocks, left)
    mixed = torch.einsum("...ais,iab->...bis", narrow, rules)
    return torch.einsum("...bis,isq->...bq", mixed, right).flatten(-2)
