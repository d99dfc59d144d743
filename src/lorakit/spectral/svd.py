"""Singular triplets of one update, and the matrix a weight is seen as.

A weight `(out, in, *kernel)` is the matrix `(out, in * prod(kernel))`. A convolution of g groups is the block-diagonal
matrix of its groups, for no group reads what another reads. An update with factors is never multiplied out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lorakit.core.factored import block_diagonal, factored, factored_values, in_one
from lorakit.core.init import by_group
from lorakit.core.method import LowRank, Static
from lorakit.core.site import Site
from lorakit.core.state import Update, delta_of
from lorakit.errors import SpecError
from lorakit.spectral.rank import numerical_rank


@dataclass(frozen=True, eq=False)
class Svd:
    """`u @ diag(s) @ vh`, the largest singular value first."""

    u: Float[Tensor, "m k"]
    s: Float[Tensor, " k"]
    vh: Float[Tensor, "k n"]

    @property
    def rank(self) -> int:
        """Return the number of directions that act: the others are 0 to rounding, and point nowhere."""
        return numerical_rank(self.s, self.u.shape[0], self.vh.shape[1])

    def leading(self, rank: int) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
        """Return the first `rank` columns of U and rows of V^T.

        Raises:
            SpecError: more directions than act.
        """
        if not 1 <= rank <= self.rank:
            raise SpecError(f"{rank} directions were asked for, and {self.rank} act; ask for 1 to as many")
        return self.u[:, :rank], self.vh[:rank]


@torch.no_grad()
def svd(update: Update, weight: Tensor | None = None) -> Svd:
    """Return the singular triplets of an update's dW, on the CPU.

    From its factors, exactly and in fp64, where it is low-rank; else the dense SVD of dW, in fp32 or better.

    Args:
        update: a static one.
        weight: the base's canonical weight, for a dW that depends on it (DoRA, IA3).

    Raises:
        SpecError: an update with no dW, or one that depends on a weight which is not given.
    """
    if isinstance(update.method, LowRank):
        return Svd(*factored(*_factors(update)))
    u, s, vh = torch.linalg.svd(_dense(update, weight), full_matrices=False)
    return Svd(*(t.cpu() for t in in_one(u, s, vh)))


@torch.no_grad()
def singular_values(update: Update, weight: Tensor | None = None) -> Float[Tensor, " k"]:
    """Return `svd(update, weight).s`, which needs neither U nor V; the same arguments and errors."""
    if isinstance(update.method, LowRank):
        return factored_values(*_factors(update))
    sigma: Tensor = torch.linalg.svdvals(_dense(update, weight))
    return sigma.flatten().sort(descending=True).values.cpu()


def matrix_view(site: Site, weight: Float[Tensor, "out in *kernel"]) -> Float[Tensor, "m n"]:
    """Return a weight as the matrix whose triplets `svd` returns: flattened, and block-diagonal where it has groups."""
    return block_diagonal(by_group(site, weight))


def _factors(update: Update) -> tuple[Tensor, Tensor]:
    assert isinstance(update.method, LowRank)
    return update.method.factors({name: t.cpu().double() for name, t in update.tensors.items()})


def _dense(update: Update, weight: Tensor | None) -> Tensor:
    """Return dW `(groups, m, n)`."""
    if not isinstance(update.method, Static):
        raise SpecError(f"{update.method.name} depends on the input, so there is no dW")
    if (delta := delta_of(update, weight)) is None:
        raise SpecError(f"the change that {update.method.name} makes depends on the weight; give the base's")
    return by_group(update.site, delta)
