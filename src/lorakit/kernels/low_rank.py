"""Linear layers that read one input, each with its low-rank update: one autograd function for all of them.

    y_i = g_i * (x W_i^T + s_i drop(x) A_i^T B_i^T) + b_i

The plain twin is the base layer plus `LowRank.branch` (DoRA's for the gain g), layer by layer. Here the layers of one
input, such as query, key and value, share the input that is kept, the mask of the dropout, one product with all A_i and
one buffer for the gradient of x. Kept for backward are x (or what it is made from, kernels/remade.py) and the thin
products `drop(x) A^T`; with a gain also the unstretched outputs. The frozen weights get no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.kernels.dropout import draw_seed, dropped, keep_mask
from lorakit.kernels.remade import Remade, remade


class Layer(NamedTuple):
    """One frozen layer and its update.

    `weight (out, in)`, or `(in, out)` if `transposed`; `bias (out,)`; `down (r, in)`, `up (out, r)` in any float dtype,
    `scale` a number, `gain (out,)`. With `base (..., out)`, the layer's own output, the update is added to it, in
    place unless it is a view, and `weight` is not read: a packed layer makes its output and the gradient of its input
    itself.
    """

    down: Tensor
    up: Tensor
    scale: float
    weight: Tensor | None = None
    bias: Tensor | None = None
    transposed: bool = False
    gain: Tensor | None = None
    base: Tensor | None = None


def low_rank_linear(x: Tensor, layers: Sequence[Layer], dropout: float = 0.0) -> tuple[Tensor, ...]:
    """Return the outputs `(..., out_i)` of the layers on `x (..., in)`; `dropout` is the rate of the updates' input."""
    seed = draw_seed(x) if dropout else 0
    if torch.is_grad_enabled():
        tensors = [t for layer in layers for t in (layer.down, layer.up, layer.gain, layer.base)]
        if any(t is not None and t.requires_grad for t in (x, *tensors)):
            made: tuple[Tensor, ...] = _LowRankLinear.apply(x, tuple(layers), dropout, seed, remade(x), *tensors)  # type: ignore[no-untyped-call]
            return made
    thin = dropped(x, dropout, seed) if dropout else x
    return tuple([_one(x, thin, layer) for layer in layers])


def _one(x: Tensor, thin: Tensor, layer: Layer) -> Tensor:
    """Return one layer's output where nothing is kept: three calls, for a single row's sake."""
    y, down, up = _base(x, layer), layer.down, layer.up
    if down.dtype != x.dtype:
        down, up = down.to(x.dtype), up.to(x.dtype)
    _flat(y).addmm_(_flat(F.linear(thin, down)), up.t(), alpha=layer.scale)
    return y if layer.gain is None else _stretched(y, layer)


def _base(x: Tensor, layer: Layer) -> Tensor:
    """Return the layer's own output; without the bias where a gain follows."""
    if layer.base is not None:  # autograd lets nobody write to views where there are several outputs
        return layer.base.clone() if layer.base._is_view() else layer.base
    assert layer.weight is not None
    weight = layer.weight.t() if layer.transposed else layer.weight
    return F.linear(x, weight, layer.bias if layer.gain is None else None)


def _sum(x: Tensor, rows: Tensor, part: Tensor, layer: Layer) -> Tensor:
    """Return the layer's own output plus `part B^T`; the wide product adds to the thin one, and hides its reading."""
    up = layer.up.to(x.dtype).t()
    if layer.weight is None:
        y = _base(x, layer)
        _flat(y).addmm_(part, up)
        return y
    bias = layer.bias if layer.gain is None else None
    y = part @ up if bias is None else torch.addmm(bias, part, up)
    return y.addmm_(rows, layer.weight if layer.transposed else layer.weight.t()).view(*x.shape[:-1], -1)


def _stretched(z: Tensor, layer: Layer) -> Tensor:
    """Return `g z + b`."""
    assert layer.gain is not None
    y = _by_gain(z, layer.gain)
    return y if layer.bias is None else y.add_(layer.bias)


def _by_gain(z: Tensor, gain: Tensor) -> Tensor:
    """Return `g z` as `z + (g - 1) z`: g itself is rounded to 1 by 16 bits where it is near 1, and g - 1 is not."""
    return torch.addcmul(z, z, (gain - 1).to(z.dtype))


def _flat(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.view(-1, t.shape[-1])


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layers: tuple[Layer, ...], dropout: float, seed: int, how: Remade | None, *_: Tensor | None
    ) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        common = layers[0].scale or 1.0
        thin, factor = rows, common
        if dropout:
            mask, lifted = keep_mask(rows, rows.shape[1], dropout, seed)
            thin, factor = mask.mul_(rows), factor * lifted
        downs = [layer.down for layer in layers]
        hidden = _times(thin, _stacked(downs).to(x.dtype).t(), factor)
        outs, unstretched = [], []
        for layer, part in zip(layers, _columns(hidden, downs), strict=True):
            if layer.scale != common:
                part.mul_(layer.scale / common)
            y = _sum(x, rows, part, layer)
            if layer.gain is not None:
                unstretched.append(y)
                y = _stretched(y, layer)
            outs.append(y)
        ctx.mark_dirty(*[layer.base for layer in layers if layer.base is not None and not layer.base._is_view()])
        ctx.reads_x = any(ctx.needs_input_grad[5::4])  # only the gradients of A do
        ctx.make = how.make if how is not None else None
        kept = () if not ctx.reads_x else (rows,) if how is None else how.kept
        ctx.dropout, ctx.seed, ctx.shape, ctx.factor = dropout, seed, x.shape, factor
        ctx.fixed = [
            (layer.scale / common, layer.transposed, layer.base is None, layer.gain is not None) for layer in layers
        ]
        own = [t for layer in layers for t in (layer.down, layer.up, layer.weight, layer.gain) if t is not None]
        ctx.save_for_backward(hidden, *own, *unstretched, *kept)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        saved = iter(ctx.saved_tensors)
        hidden = next(saved)
        layers = [
            (next(saved), next(saved), next(saved) if owns else None, next(saved) if gains else None)
            for _, _, owns, gains in ctx.fixed
        ]
        unstretched = [next(saved) if gains else None for _, _, _, gains in ctx.fixed]
        kept = tuple(saved)
        downs = [down for down, *_ in layers]
        thin_grad = torch.empty_like(hidden)
        flat_grads: list[Tensor] = []
        found: list[Tensor | None] = [None] * (4 * len(layers))
        columns = zip(_columns(hidden, downs), _columns(thin_grad, downs), strict=True)
        parts = zip(layers, ctx.fixed, grads, unstretched, columns, strict=True)
        for i, ((_, up, weight, gain), (share, *_), grad, z, (part, part_grad)) in enumerate(parts):
            dy = grad.reshape(-1, grad.shape[-1])
            if gain is not None and z is not None:
                found[4 * i + 2] = (dy * _flat(z)).sum(0, dtype=gain.dtype)
                dy = _by_gain(dy, gain)
            flat_grads.append(dy)
            torch.mm(dy, up.to(dy.dtype), out=part_grad)
            if share != 1.0:
                part_grad.mul_(share)
            if needs[5 + 4 * i + 1]:
                found[4 * i + 1] = (part.t() @ dy).t().to(up.dtype)
            if weight is None:
                found[4 * i + 3] = grad
        if ctx.factor != 1.0:
            thin_grad.mul_(ctx.factor)
        down = _stacked(downs)
        mask = keep_mask(hidden, down.shape[1], ctx.dropout, ctx.seed)[0] if ctx.dropout else None
        x_grad: Tensor | None = None
        if needs[0]:
            x_grad = thin_grad @ down.to(thin_grad.dtype)
            if mask is not None:
                x_grad.mul_(mask)
            for dy, (_, _, weight, _), (_, transposed, *_) in zip(flat_grads, layers, ctx.fixed, strict=True):
                if weight is not None:
                    x_grad.addmm_(dy, weight.t() if transposed else weight)
            x_grad = x_grad.view(ctx.shape)
        if ctx.reads_x:
            rows = (kept[0] if ctx.make is None else ctx.make(*kept)).reshape(-1, ctx.shape[-1])
            thin = rows if mask is None else mask.mul_(rows)
            for i, down_grad in enumerate(torch.split((thin_grad.t() @ thin).to(down.dtype), [len(d) for d in downs])):
                found[4 * i] = down_grad if needs[5 + 4 * i] else None
        return (x_grad, None, None, None, None, *found)


def _stacked(downs: Sequence[Tensor]) -> Tensor:
    """Return all A_i as one matrix `(r_1 + r_2 + ..., in)`."""
    return downs[0] if len(downs) == 1 else torch.cat(tuple(downs))


def _columns(thin: Tensor, downs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return each layer's own columns of a thin product with all A_i."""
    return (thin,) if len(downs) == 1 else torch.split(thin, [len(down) for down in downs], 1)


def _times(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """Return `factor a b`, multiplied where the sums are, not after they are rounded."""
    return a @ b if factor == 1.0 else torch.addmm(a.new_empty(()), a, b, beta=0, alpha=factor)
