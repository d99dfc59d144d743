"""How alike two subspaces are: whether two adapters, or two ranks, or two seeds, found the same directions.

A subspace is given by an orthonormal basis in rows, the strongest direction first: `directions(A)` of a factor, or the
`vh` (inputs) or `u.T` (outputs) of `Svd.leading`, which leaves out directions of size 0. The paper takes right singular
vectors of A (arXiv 2106.09685, section 7.2; its appendix G says left, but only the right ones of two ranks lie in one
space).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lorakit.errors import SpecError
from lorakit.spectral.rank import numerical_rank

ORTHONORMAL = 1e-3
"""How far `V V^T` may be from the identity: an SVD in fp32 is within 1e-5, a factor that is no basis is not near."""


@torch.no_grad()
def directions(factor: Float[Tensor, "r in *kernel"]) -> Float[Tensor, "k n"]:
    """Return the right singular vectors of a factor `A (r, in, *kernel)` in rows, strongest first.

    Only those that act: a direction of size 0 could be any, so a factor of 0 has none, `k = 0`.
    """
    matrix = factor.flatten(1).to(torch.promote_types(factor.dtype, torch.float32))
    _, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    acting: Tensor = vh[: numerical_rank(s, *matrix.shape)]
    return acting


@torch.no_grad()
def random_directions(rank: int, n: int, rng: torch.Generator | None = None) -> Float[Tensor, "r n"]:
    """Return a basis of a uniformly random subspace, as a random Gaussian matrix has, in fp64."""
    if not 1 <= rank <= n:
        raise SpecError(f"a subspace of dimension {rank} is not within 1 to {n}")
    q: Tensor = torch.linalg.qr(torch.randn(n, rank, dtype=torch.float64, generator=rng)).Q
    return q.T


def similarity(first: Float[Tensor, "r n"], second: Float[Tensor, "s n_"], i: int, j: int) -> float:
    """Return `phi(i, j) = |U_first^i^T U_second^j|_F^2 / min(i, j)` of the leading i and j directions.

    Eq. 4 of arXiv 2106.09685: from 0, orthogonal, to 1, the smaller one lies in the larger one. `phi = 1 - d^2 / p`
    with p = min(i, j) and d the projection distance; the paper's last line prints `(1 - d^2) / p`.

    Raises:
        SpecError: i or j beyond the directions there are, bases of other widths, rows that are not orthonormal.
    """
    first, second = _bases(first, second)
    for count, basis in ((i, first), (j, second)):
        if not 1 <= count <= len(basis):
            raise SpecError(f"{count} directions were asked for, and there are {len(basis)}; ask for 1 to as many")
    return float((first[:i] @ second[:j].T).square().sum()) / min(i, j)


def similarities(first: Float[Tensor, "r n"], second: Float[Tensor, "s n_"]) -> Float[Tensor, "r s"]:
    """Return the whole grid of figures 3 and 4: entry `[i - 1, j - 1]` is `similarity(first, second, i, j)`."""
    first, second = _bases(first, second)
    i, j = (torch.arange(1, len(basis) + 1) for basis in (first, second))
    return (first @ second.T).square().cumsum(0).cumsum(1) / torch.minimum(i[:, None], j)


def chance(i: int, j: int, n: int) -> float:
    """Return the mean of `similarity` between random subspaces of dimension i and j of R^n: `max(i, j) / n`."""
    if not (1 <= i <= n and 1 <= j <= n):
        raise SpecError(f"subspaces of dimension {i} and {j} are not both within 1 to {n}")
    return max(i, j) / n


def principal_angles(first: Float[Tensor, "r n"], second: Float[Tensor, "s n_"]) -> Float[Tensor, " p"]:
    """Return the `p = min(r, s)` angles between two subspaces in radians, the smallest first.

    From cosines above 45 degrees and from sines below, where a cosine cannot tell an angle of 1e-9 from 0 (Björck and
    Golub, Math. Comp. 27, 1973).
    """
    first, second = _bases(first, second)
    cosines = torch.linalg.svdvals(first @ second.T).clamp(0, 1)
    sines = torch.linalg.svdvals(second - (second @ first.T) @ first).flip(0).clamp(0, 1)
    return torch.where(cosines.square() < 0.5, cosines.acos(), sines[: len(cosines)].asin())


def projection_distance(first: Float[Tensor, "r n"], second: Float[Tensor, "s n_"]) -> float:
    """Return `d = sqrt(p - sum cos^2 theta) = sqrt(sum sin^2 theta)`, the projection metric on the Grassmannian.

    From 0 to sqrt(p), p = min(r, s). For r = s it is the chordal distance `|P_first - P_second|_F / sqrt(2)`.
    """
    return float(principal_angles(first, second).sin().norm())


def geodesic_distance(first: Float[Tensor, "r n"], second: Float[Tensor, "s n_"]) -> float:
    """Return `sqrt(sum theta^2)`, the length of the shortest way on the Grassmannian, for two equal dimensions."""
    if len(first) != len(second):
        raise SpecError(
            f"subspaces of dimension {len(first)} and {len(second)} lie on no one Grassmannian; use the same number of "
            "directions of each, or projection_distance"
        )
    return float(principal_angles(first, second).norm())


def _bases(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in fp64 on the CPU, or raise `SpecError`."""
    if first.shape[1] != second.shape[1]:
        raise SpecError(
            f"directions of {first.shape[1]} and of {second.shape[1]} features lie in different spaces; "
            "compare updates of one weight, inputs with inputs or outputs with outputs"
        )
    wide = [basis.detach().cpu().double() for basis in (first, second)]
    for basis in wide:
        off = basis @ basis.T - torch.eye(len(basis), dtype=basis.dtype)
        if not (off.abs() <= ORTHONORMAL).all():
            raise SpecError("the rows are not orthonormal; give directions(A), or the vh or u.T of Svd.leading")
    return wide[0], wide[1]
