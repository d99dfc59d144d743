"""Attention with dropout on a CPU: one autograd function whose mask is made again from its seed.

    P = softmax(s Q K^T, masked)        arXiv 1706.03762, eq. 1
    O = (P * M / (1 - p)) V             M is 0 at rate p, else 1: section 5.4 there

torch's fast kernels for a CPU know no dropout: it falls back to the formula written out, widens what is 16 bits wide,
and draws the mask one value after the other. Kept here are Q, K, V and P alone; scores and softmax are fp32 or wider.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from lorakit.kernels.dropout import draw_seed, keep_mask


def dropped_attention(q: Tensor, k: Tensor, v: Tensor, sees: Tensor | None, rate: float, scale: float) -> Tensor:
    """Return `O (batch, heads, queries, width)` of `q` and of `k`, `v (batch, heads, keys, width)`.

    `sees`, bool and broadcast to `(batch, heads, queries, keys)`, tells which keys a query sees; one that sees none
    gets zeros.
    """
    with torch.autocast(q.device.type, enabled=False):  # the scores stay wide
        made: Tensor = _DroppedAttention.apply(q, k, v, sees, rate, draw_seed(q), scale)  # type: ignore[no-untyped-call]
    return made


class DropsInAttention(TorchFunctionMode):
    """The context in which attention with dropout, on a CPU and of a form that is known here, is computed here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, or what stands for it."""
        given = kwargs or {}
        if func is F.scaled_dot_product_attention and given.get("dropout_p") and _is_known(*args, **given):
            return _attended(*args, **given)
        return func(*args, **given)


def _is_known(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **given: Any) -> bool:
    alike = q.dim() == 4 and q.dtype == k.dtype == v.dtype and q.shape[:2] == k.shape[:2] == v.shape[:2]
    read = attn_mask is None or attn_mask.dtype == torch.bool
    return alike and read and q.device.type == "cpu" and not given.get("enable_gqa")


def _attended(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **given: Any) -> Tensor:
    if given.get("is_causal"):
        attn_mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scale = given.get("scale")
    return dropped_attention(q, k, v, attn_mask, given["dropout_p"], q.shape[-1] ** -0.5 if scale is None else scale)


class _DroppedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sees: Tensor | None, rate: float, seed: int, scale: float
    ) -> Tensor:
        shape = (*q.shape[:-1], k.shape[-2])
        q, k, v = (t.reshape(-1, *t.shape[-2:]) for t in (q, k, v))
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = _times(q.to(wide), k.to(wide).mT, scale)
        if sees is not None:
            scores.view(shape).masked_fill_(~sees, torch.finfo(wide).min)
        p = torch.softmax(scores, -1).to(q.dtype)
        del scores
        keep, factor = _keep(p, sees, shape, rate, seed)
        ctx.save_for_backward(q, k, v, p, sees)
        ctx.drawn, ctx.scale, ctx.shape = (rate, seed), scale, shape
        return _times(keep.mul_(p), v, factor).view(*shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        q, k, v, p, sees = ctx.saved_tensors
        upstream = upstream.reshape(-1, *upstream.shape[-2:])
        keep, factor = _keep(p, sees, ctx.shape, *ctx.drawn)
        p_grad = torch.bmm(upstream, v.mT).mul_(keep)
        v_grad = _times(keep.mul_(p).mT, upstream, factor)
        scores_grad = torch._softmax_backward_data(p_grad, p, -1, p.dtype)
        del p_grad, keep
        q_grad = _times(scores_grad, k, ctx.scale * factor)
        k_grad = _times(scores_grad.mT, q, ctx.scale * factor)
        heads = ctx.shape[:-2]
        return (*(t.view(*heads, *t.shape[-2:]) for t in (q_grad, k_grad, v_grad)), None, None, None, None)


def _keep(p: Tensor, sees: Tensor | None, shape: tuple[int, ...], rate: float, seed: int) -> tuple[Tensor, float]:
    """Return ones, zeros where a probability is dropped or not seen, and the factor of the others."""
    mask, factor = keep_mask(p.view(-1, p.shape[-1]), p.shape[-1], rate, seed)
    if sees is not None:
        mask.view(shape).mul_(sees)
    return mask.view(p.shape), factor


def _times(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """Return `factor a b`, multiplied where the sums are, not after they are rounded."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=factor)
