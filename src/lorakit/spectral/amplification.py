"""What an update amplifies: how much the weight already holds of the directions that dW uses (arXiv 2106.09685, 7.3).

With U, V the r leading singular vectors of dW, `|U^T W V|_F` is what W holds of them and `|dW|_F / |U^T W V|_F` the
amplification factor. Beside it, what W holds of its own r leading directions, the most there can be, and of random
ones: small in dW's row and large in W's says that dW brings up what W had, but hardly used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lorakit.core.init import leading
from lorakit.errors import SpecError
from lorakit.spectral.svd import Svd


@dataclass(frozen=True)
class Projections:
    """One row group of the paper's table 7: `|U^T W V|_F` for three choices of r directions U, V.

    `update`: those of dW. `weight`: W's own, `sqrt(sum_(i <= r) sigma_i(W)^2)`. `random`: the root mean square over
    random ones, `|W|_F r / sqrt(m n)`. All, the norms of dW and W, and the largest singular values of W (`decay`), are
    in the unit of the weights.
    """

    rank: int
    update: float
    weight: float
    random: float
    update_norm: float
    weight_norm: float
    decay: tuple[float, ...] = ()

    @property
    def factor(self) -> float:
        """Return the amplification factor `|dW|_F / |U^T W V|_F`; infinite where W holds nothing of dW's directions."""
        return self.update_norm / self.update if self.update else math.inf


def projection(u: Float[Tensor, "m r"], weight: Float[Tensor, "m n"], vh: Float[Tensor, "r n"]) -> float:
    """Return `|U^T W V|_F`, which is at most `|W|_F`."""
    return float(torch.linalg.matrix_norm(u.to(weight).T @ weight @ vh.to(weight).T))


@torch.no_grad()
def correlation(update: Svd, weight: Float[Tensor, "m n"]) -> float:
    """Return `cos(dW, W) = <dW, W>_F / (|dW|_F |W|_F)`: whether dW repeats W (1), undoes it (-1) or is new (0).

    With the triplets of dW it is `sum_i sigma_i u_i^T W v_i` above the line. 0 where either is 0.
    """
    s = update.s.to(torch.promote_types(weight.dtype, torch.float32))
    along = ((update.u.to(s).T @ weight.to(s)) * update.vh.to(s)).sum(1) @ s
    size = float(s.norm()) * float(torch.linalg.matrix_norm(weight.to(s)))
    return float(along) / size if size else 0.0


def random_projection(norm: float, m: int, n: int, rank: int) -> float:
    """Return `|W|_F r / sqrt(m n)`: the root mean square of `projection` over random U and V of rank r."""
    return norm * rank / math.sqrt(m * n)


@torch.no_grad()
def amplification(
    update: Svd,
    weight: Float[Tensor, "m n"],
    rank: int | None = None,
    iterations: int | None = None,
    rng: torch.Generator | None = None,
    values: int = 0,
) -> Projections:
    """Return table 7 for one weight: what W holds of dW's, of its own and of random directions, and the factor.

    Args:
        update: the triplets of dW.
        weight: W as a matrix (`matrix_view`), with no scale folded in.
        rank: r, all directions of dW by default; with fewer, the factor still has the whole |dW|_F above the line.
        iterations: of a randomised SVD for W's own directions; a dense SVD of W without.
        rng: of that randomised SVD.
        values: how many singular values of W to return at least, where it has as many.

    Raises:
        SpecError: a dW of 0, a rank beyond the directions dW has, a weight of another shape.
    """
    shape = (update.u.shape[0], update.vh.shape[1])
    if tuple(weight.shape) != shape:
        raise SpecError(f"the weight is {tuple(weight.shape)}, and dW {shape}; give matrix_view(site, weight)")
    if update.rank == 0:
        raise SpecError("dW is 0, so it has no directions; leave out what is_dead")
    rank = update.rank if rank is None else rank
    u, vh = update.leading(rank)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    own = leading(wide.unsqueeze(0), max(rank, min(values, *shape)), iterations, rng)[1].flatten()
    norm = float(torch.linalg.matrix_norm(wide))
    return Projections(
        rank=rank,
        update=projection(u, wide, vh),
        weight=float(own[:rank].norm()),
        random=random_projection(norm, *shape, rank),
        update_norm=float(update.s.norm()),
        weight_norm=norm,
        decay=tuple(own.tolist()),
    )
