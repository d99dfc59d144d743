"""Low-rank updates of single rows of one batch, each row its own: what many adapters on one base come down to.

    y_i += s_i x_i D_i^T U_i^T        x (n, in), y (n, out), D_i (r, in), U_i^T (r, out)

The plain twin is `each_row`, one row after the other. `rows` has the factors of every row side by side in memory and
takes two batched products (S-LoRA's padded variant, arXiv 2311.03285, section 5.3; Punica's BGMV gathers instead,
arXiv 2310.18547), or one pass of C (compiled.py); `span` is for neighbouring rows of one adapter, `scattered` for rows
of one adapter anywhere. Every product is in the factors' dtype, fp32, whatever the base's: a sum in bf16 would lose
most of a small update. In memory both factors go along their long side, which thin products read fastest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lorakit.kernels import compiled


def rows(
    y: Float[Tensor, "*n outputs"],
    x: Float[Tensor, "*n inputs"],
    down: Float[Tensor, "n r inputs"],
    up: Float[Tensor, "n r outputs"],
) -> None:
    """Add `x_i down_i^T up_i` to each row of `y`, in place; rows without an update have factors of zeros."""
    if compiled.rows(y, x, down, up):
        return
    thin = torch.bmm(x.reshape(down.shape[0], 1, -1).to(down.dtype), down.mT)
    each = y.view(up.shape[0], 1, -1)
    if y.dtype == up.dtype:
        each.baddbmm_(thin, up)
    else:
        each += torch.bmm(thin, up).to(y.dtype)


def span(
    y: Float[Tensor, "*n outputs"],
    x: Float[Tensor, "*n inputs"],
    down: Float[Tensor, "r inputs"],
    up: Float[Tensor, "r outputs"],
    scale: float,
) -> None:
    """Add `scale x down^T up` to `y`, in place."""
    thin = x.reshape(-1, down.shape[1]).to(down.dtype) @ down.mT
    flat = y.view(-1, up.shape[1])
    if y.dtype == up.dtype:
        flat.addmm_(thin, up, alpha=scale)
    else:
        flat += torch.mm(thin, up).mul_(scale).to(y.dtype)


def scattered(
    y: Float[Tensor, "n outputs"],
    x: Float[Tensor, "n inputs"],
    at: Int[Tensor, " k"],
    down: Float[Tensor, "r inputs"],
    up: Float[Tensor, "r outputs"],
    scale: float,
) -> None:
    """Add `scale x_i down^T up` to the rows `at` of `y`, in place."""
    thin = x.index_select(0, at).to(down.dtype) @ down.mT
    y.index_add_(0, at, torch.mm(thin, up).to(y.dtype), alpha=scale)


def each_row(
    y: Float[Tensor, "n outputs"], x: Float[Tensor, "n inputs"], pairs: Sequence[tuple[Tensor, Tensor, float] | None]
) -> Tensor:
    """Return `y` with the update of each row added, row by row: `pairs` are `(down (r, in), up (r, out), scale)`."""
    made = [
        row if pair is None else row + (pair[2] * (x_row.to(pair[0].dtype) @ pair[0].mT @ pair[1])).to(y.dtype)
        for row, x_row, pair in zip(y, x, pairs, strict=True)
    ]
    return torch.stack(made) if made else y.clone()
