"""Intruder dimensions: strong directions of a fine-tuned weight that its base has nothing like (arXiv 2410.21228).

The j-th left singular vector y_j of `W + dW` is an intruder where `max_i |cos(y_j, x_i)| < epsilon` over all left
singular vectors x_i of W. Low-rank updates make them, full fine-tuning hardly does, and they go with forgetting.
Scaling them down, `W + dW + (keep - 1) sum u sigma v^T`, gives some of that back: keep = 1 changes nothing, keep = 0
takes the intruders out. (PEFT computes the same and says the opposite of its lambda.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lorakit.errors import SpecError

TOP, EPSILON = 10, 0.5
"""How many directions are looked at, and below which cosine they are intruders: the paper's choices."""


@dataclass(frozen=True, eq=False)
class Intruders:
    """The leading triplets of `W + dW`, the cosine of each to its nearest direction of W, and what counts as none.

    Another epsilon is `dataclasses.replace(found, epsilon=0.3)`: nothing is computed anew.
    """

    cosines: Float[Tensor, " k"]
    u: Float[Tensor, "m k"]
    s: Float[Tensor, " k"]
    vh: Float[Tensor, "k n"]
    epsilon: float = EPSILON

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon <= 1:
            raise SpecError(f"epsilon is a cosine, from 0 to 1, not {self.epsilon!r}; the paper's is {EPSILON}")

    @property
    def places(self) -> tuple[int, ...]:
        """Return which of the leading directions are intruders, from 0."""
        return tuple((self.cosines < self.epsilon).nonzero().flatten().tolist())

    @property
    def count(self) -> int:
        """Return how many there are."""
        return len(self.places)

    def mitigation(self, keep: float) -> tuple[Float[Tensor, "c n"], Float[Tensor, "m c"]]:
        """Return `(down, up)` with `up @ down = (keep - 1) sum u sigma v^T` over the c intruders.

        Added to dW it leaves `keep` of them: 1 changes nothing, 0 takes them out. A LoRA takes it in exactly, by c
        ranks more.

        Raises:
            SpecError: a `keep` outside 0 to 1.
        """
        if not 0 <= keep <= 1:
            raise SpecError(f"keep is what is left of an intruder, from 0 to 1, not {keep!r}")
        at = list(self.places)
        return self.vh[at], (keep - 1) * self.u[:, at] * self.s[at]


@torch.no_grad()
def intruders(
    weight: Float[Tensor, "m n"], delta: Float[Tensor, "m_ n_"], top: int = TOP, epsilon: float = EPSILON
) -> Intruders:
    """Return the intruder dimensions among the `top` leading directions of `weight + delta`.

    Two dense SVDs, in fp32 or better: the definition asks for every left singular vector of W.

    Args:
        weight: W as a matrix (`matrix_view`).
        delta: dW, the same.
        top: how many directions of the sum are looked at.
        epsilon: the cosine below which one is an intruder.

    Raises:
        SpecError: shapes that differ, a `top` below 1 or above min(m, n), an epsilon that is no cosine.
    """
    if weight.shape != delta.shape:
        raise SpecError(f"the weight is {tuple(weight.shape)} and dW {tuple(delta.shape)}; give both as one matrix")
    if not 1 <= top <= min(weight.shape):
        raise SpecError(f"top must be from 1 to min(m, n) = {min(weight.shape)}, not {top!r}")
    wide = torch.promote_types(torch.promote_types(weight.dtype, delta.dtype), torch.float32)
    base, change = weight.to(wide), delta.to(wide)
    u, s, vh = torch.linalg.svd(base + change, full_matrices=False)
    x = torch.linalg.svd(base, full_matrices=False).U
    cosines = (u[:, :top].T @ x).abs().amax(1).clamp(max=1)
    return Intruders(cosines, u[:, :top], s[:top], vh[:top], epsilon)
