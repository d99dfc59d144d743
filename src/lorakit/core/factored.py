"""The singular value decomposition of a product of thin factors, which is never formed.

`up = Q_u R_u`, `down^T = Q_d R_d` and `R_u R_d^T = U' S V'^T` give `up down = (Q_u U') S (Q_d V')^T`: the exact
triplets in O((m + n) r^2) instead of O(m n min(m, n)), as in Chan's R-SVD (ACM TOMS 8, 1982), with a QR on both sides.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lorakit.core.method import per_group


@torch.no_grad()
def factored(
    down: Float[Tensor, "r in *kernel"], up: Float[Tensor, "out rg"]
) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "k n"]]:
    """Return U, S, V^T of `up @ down` as a matrix, largest first, without forming it.

    `n = in * prod(kernel)` and `k = min(r, out, n)`. With g groups, `up (out, r / g)`, the matrix is the
    block-diagonal one of all groups, `n = g * in * prod(kernel)`. In fp64 on the CPU: r is small, and not every
    device has fp64.
    """
    q_up, q_down, core = _reduced(down, up)
    left, sigma, right = torch.linalg.svd(core, full_matrices=False)
    return in_one(q_up @ left, sigma, right @ q_down.mT)


@torch.no_grad()
def factored_values(down: Float[Tensor, "r in *kernel"], up: Float[Tensor, "out rg"]) -> Float[Tensor, " k"]:
    """Return S of `factored`, which needs neither U nor V."""
    sigma: Tensor = torch.linalg.svdvals(_reduced(down, up)[2])
    return sigma.flatten().sort(descending=True).values


def entropy_rank(sigma: Float[Tensor, " k"]) -> Float[Tensor, ""]:
    """Return `exp(-sum p ln p)` with `p = sigma / sum sigma`, 1 where all are 0 (Roy and Vetterli, EUSIPCO 2007)."""
    p = sigma / sigma.sum()
    p = p[p > 0]
    return (-(p * p.log()).sum()).exp()


def in_one(
    u: Float[Tensor, "groups m k"], s: Float[Tensor, "groups k"], vh: Float[Tensor, "groups k n"]
) -> tuple[Float[Tensor, "rows triplets"], Float[Tensor, " triplets"], Float[Tensor, "triplets columns"]]:
    """Return the triplets of `block_diag(U_1 S_1 V_1^T, ...)`, largest first, from those of each block."""
    order = s.flatten().argsort(descending=True, stable=True)
    return block_diagonal(u)[:, order], s.flatten()[order], block_diagonal(vh)[order]


def block_diagonal(blocks: Float[Tensor, "groups m n"]) -> Float[Tensor, "rows columns"]:
    """Return the matrix with these blocks on its diagonal and 0 elsewhere."""
    return blocks[0] if len(blocks) == 1 else torch.block_diag(*blocks)  # type: ignore[no-untyped-call]


def _reduced(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `Q_u (g, m, .)`, `Q_d (g, n, .)` and `R_u R_d^T` of each group."""
    d, u = per_group(down.detach().cpu().double(), up.detach().cpu().double())
    q_up, r_up = torch.linalg.qr(u)
    q_down, r_down = torch.linalg.qr(d.mT)
    return q_up, q_down, r_up @ r_down.mT
