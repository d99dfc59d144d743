"""The change of one weight, as what it is known by: two thin factors where there are any, else the matrix itself.

Sums, sizes and singular values of products are taken on the factors, in fp64, so no `(out, in)` matrix is formed for
them: `sum_i L_i R_i = [L_1, L_2, ...] [R_1; R_2; ...]`, and QR of both sides does the rest (core/factored.py). Each
group of a convolution is a matrix of its own, hence the leading axis g.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lorakit.core.as_lora import plain_lora
from lorakit.core.factored import factored, factored_values
from lorakit.core.init import by_group, leading
from lorakit.core.method import LowRank, per_group
from lorakit.core.site import Site
from lorakit.core.state import Update, delta_of


@dataclass(frozen=True, eq=False)
class Pair:
    """The product `left @ right` of each group."""

    left: Float[Tensor, "g m r"]
    right: Float[Tensor, "g r n"]

    @classmethod
    def of(cls, down: Float[Tensor, "gr *in"], up: Float[Tensor, "out r"]) -> Pair:
        """Return the product of factors as a method stores them: the inverse of `factors`, for any kernel."""
        right, left = per_group(down, up)
        return cls(left, right)

    @property
    def rank(self) -> int:
        """Return r, of each group."""
        return self.left.shape[2]

    @property
    def factors(self) -> tuple[Float[Tensor, "gr n"], Float[Tensor, "out r"]]:
        """Return `(down, up)` as a method stores them."""
        return self.right.flatten(0, 1), self.left.flatten(0, 1)


Change = Pair | Tensor
"""A product, or the matrices `(g, m, n)`."""


@torch.no_grad()
def change_of(update: Update, weight: Tensor | None) -> Change | None:
    """Return the change of a static update on the CPU, factors in fp64; None where it asks for a weight not given."""
    if isinstance(update.method, LowRank):
        wide = {name: tensor.detach().cpu().double() for name, tensor in update.tensors.items()}
        return Pair.of(*update.method.factors(wide))
    delta = delta_of(update, weight)
    return None if delta is None else by_group(update.site, delta.detach().cpu())


def update_of(site: Site, pair: Pair, dtype: torch.dtype) -> Update:
    """Return a product as the plain LoRA of a site, stored in this dtype."""
    down, up = (factor.to(dtype).contiguous() for factor in pair.factors)
    return Update(site, plain_lora(len(down)), {"down": down.reshape(-1, site.in_, *site.kernel), "up": up})


def dense(change: Change, dtype: torch.dtype) -> Float[Tensor, "g m n"]:
    """Return the matrices."""
    if isinstance(change, Pair):
        return change.left.to(dtype) @ change.right.to(dtype)
    return change.to(dtype)


def added(changes: Sequence[Change], weights: Sequence[float]) -> Change:
    """Return `sum_i w_i change_i`: factors side by side, `[L_1, ...] [w_1 R_1; ...]`, as long as all are factors."""
    pairs = [change for change in changes if isinstance(change, Pair)]
    if len(pairs) == len(changes):
        rights = [weight * pair.right for weight, pair in zip(weights, pairs, strict=True)]
        return Pair(torch.cat([pair.left for pair in pairs], 2), torch.cat(rights, 1))
    dtype = next(change.dtype for change in changes if isinstance(change, Tensor))
    first, *others = (weight * dense(change, dtype) for weight, change in zip(weights, changes, strict=True))
    return sum(others, first)


def size(change: Change) -> float:
    """Return the Frobenius norm of all groups together."""
    if isinstance(change, Pair):
        return float(factored_values(*change.factors).norm())
    return float(torch.linalg.vector_norm(change, dtype=torch.float64))


def triplets(change: Change) -> tuple[Float[Tensor, "g m k"], Float[Tensor, "g k"], Float[Tensor, "g k n"]]:
    """Return U, S, V^T of each group, largest first."""
    if not isinstance(change, Pair):
        return leading(change, min(change.shape[1:]))
    each = [factored(right, left) for left, right in zip(change.left, change.right, strict=True)]
    u, s, vh = (torch.stack(parts) for parts in zip(*each, strict=True))
    return u, s, vh


def raised(change: Change, rows: tuple[int, int], height: int) -> Change:
    """Return the change of a layer's rows as one of the whole layer, `height` rows, 0 elsewhere."""
    own = change.left if isinstance(change, Pair) else change
    tall = own.new_zeros(own.shape[0], height, own.shape[2])
    tall[:, rows[0] : rows[1]] = own
    return Pair(tall, change.right) if isinstance(change, Pair) else tall
