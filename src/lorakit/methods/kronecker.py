"""The Kronecker product as a change of a weight: the mathematics LoKr and KronA share.

`w1 (a, c) kron w2 (b, e)` is the `(a b, c e)` matrix of blocks `w1[i, j] w2`; its rank is `rank(w1) rank(w2)`, so a few
numbers make an update of full rank. A kernel belongs to w2: the channels are factored, the positions are not.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lorakit.core.method import Call
from lorakit.core.targets import LINEAR_KINDS


def factorization(width: int, factor: int | None = None) -> tuple[int, int]:
    """Return `(p, q)` with `p q = width`: p = `factor` where it divides the width, else p <= q as near as can be.

    Without a factor that is the divisor nearest the root, 768 -> (24, 32); with one that does not divide, the largest
    divisor up to it. LyCORIS and PEFT cut a width in the same way.
    """
    if factor is not None and width % factor == 0:
        return factor, width // factor
    root = math.isqrt(width)
    p = max(d for d in range(1, min(root, factor or root) + 1) if width % d == 0)
    return p, width // p


def kron(w1: Float[Tensor, "a c"], w2: Float[Tensor, "b e *kernel"]) -> Float[Tensor, "ab ce *kernel"]:
    """Return `w1 kron w2`, whose entry `[i b + k, j e + l]` is `w1[i, j] w2[k, l]`."""
    return torch.kron(w1.reshape(*w1.shape, *[1] * (w2.dim() - 2)), w2.contiguous())


def kron_times(x: Float[Tensor, "*tokens ce"], w1: Float[Tensor, "a c"], *w2: Tensor) -> Float[Tensor, "*tokens ab"]:
    """Return `(w1 kron w2) x` without forming the product: `vec(w1 X w2^T)`, X the rows of x as `(c, e)` matrices.

    w2 comes in factors: `(b, e)`, or `(b, r), (r, e)`. The cheaper order is taken: with w2 in one piece
    `c e b + a c b` multiplications a token, or `a c e + a e b`.
    """
    (a, c), b, e = w1.shape, w2[0].shape[0], w2[-1].shape[1]
    size = sum(w.numel() for w in w2)
    grid = x.reshape(*x.shape[:-1], c, e)
    if c * size + b * a * c <= e * a * c + a * size:
        return (w1 @ _right(grid, w2)).flatten(-2)
    return _right(w1 @ grid, w2).flatten(-2)


def kron_branch(call: Call, w1: Float[Tensor, "a c"], *w2: Tensor) -> Tensor:
    """Return `op(x; w1 kron w2)`; only a convolution or a lookup forms the product, as they have no cheaper way.

    w2 comes in factors: `(b, e, *kernel)`, or `(b, r), (r, e * prod(kernel))`.
    """
    if call.host.kind in LINEAR_KINDS:
        return kron_times(call.x, w1, *w2)
    return call.apply(kron_like(call.weight, w1, *w2))


def kron_like(weight: Float[Tensor, "out in *kernel"], w1: Float[Tensor, "a c"], *w2: Tensor) -> Tensor:
    """Return `w1 kron w2` in the weight's shape; w2 comes in factors as in `kron_branch`."""
    whole = w2[0] if len(w2) == 1 else w2[0] @ w2[1]
    return kron(w1, whole.reshape(whole.shape[0], weight.shape[1] // w1.shape[1], *weight.shape[2:]))


def _right(grid: Tensor, w2: tuple[Tensor, ...]) -> Tensor:
    """Return `grid w2^T`, factor by factor."""
    for factor in reversed(w2):
        grid = F.linear(grid, factor)
    return grid
