"""Cross-entropy summed over the trained rows, from logits, or from the hidden states a head makes them of.

`sum_i logsumexp(l_i) - l_i[y_i]` with `l = s(x W^T + b)`, and `cap * tanh(l / cap)` where the model caps its logits.
A row that is not trained is never projected. The gradient, softmax less one at the label, is made on the way, for a few
rows at a time, so the logits of a head never exist whole, nor in fp32 those that are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS, VALUES, CHUNKS = 64, 2**21, 32
"""At once: rows that keep a matrix product busy, or so many logits (8 MB in fp32), or this part of all rows."""


@dataclass(frozen=True)
class Temper:
    """What a model does to its head's output: times `scale`, then `cap * tanh(. / cap)`."""

    scale: float = 1.0
    cap: float | None = None

    def plain(self, logits: Tensor) -> Tensor:
        """Return the logits `(..., vocabulary)` of a head's output."""
        scaled = logits if self.scale == 1.0 else logits * self.scale
        return scaled if self.cap is None else self.cap * (scaled / self.cap).tanh()

    def in_place(self, logits: Tensor, *, slope: bool) -> Tensor | float | None:
        """Make the logits of a head's output, and return the derivative of the one by the other, if asked for."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.cap is None:
            return None if self.scale == 1.0 else self.scale
        logits.div_(self.cap).tanh_()
        derivative = logits.square().neg_().add_(1.0).mul_(self.scale) if slope else None
        logits.mul_(self.cap)
        return derivative


def summed_cross_entropy(logits: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    """Return the sum over `rows (k,)` of `logits (n, vocabulary)`, whose right classes are `labels (k,)`; in fp32."""
    logits = logits if torch.is_grad_enabled() else logits.detach()
    loss: Tensor = _CrossEntropy.apply(logits, None, None, rows, labels, Temper())  # type: ignore[no-untyped-call]
    return loss


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    labels: Tensor,
    temper: Temper = Temper(),
) -> Tensor:
    """Return the cross-entropy of `hidden (n, d)` under a head `weight (vocabulary, d)`, summed over `rows`, in fp32.

    Args:
        hidden: in the dtype the products shall be computed in, that of `weight`.
        weight: of the head; its gradient is made only where it is trained.
        bias: `(vocabulary,)`, or None.
        rows: `(k,)`, the trained rows of `hidden`.
        labels: `(k,)`, their right classes.
        temper: what becomes of the head's output.
    """
    if not torch.is_grad_enabled():  # a function is told of tensors that require a gradient, not of the mode
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    loss: Tensor = _CrossEntropy.apply(hidden, weight, bias, rows, labels, temper)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    """The sum, and its gradients for `x (n, d)`, `weight (vocabulary, d)` and `bias`; without a weight x are logits.

    Kept for the backward is one row of gradient for each trained row of x, in the dtype of x.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, rows: Tensor, labels: Tensor, temper: Temper
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        wanted = ctx.needs_input_grad[:3]
        dx = x.new_empty(len(rows), x.shape[1]) if wanted[0] else None
        dw, db = (
            torch.zeros_like(t, dtype=wide) if asked and t is not None else None
            for t, asked in ((weight, wanted[1]), (bias, wanted[2]))
        )
        classes = x.shape[1] if weight is None else weight.shape[0]
        at_once = max(ROWS, VALUES // classes, len(rows) // CHUNKS)
        tops, masses, chosen = list[Tensor](), list[Tensor](), list[Tensor]()
        split = [torch.split(t, at_once) for t in (rows, labels.unsqueeze(1), *([] if dx is None else [dx]))]
        for part, right, *to in zip(*split, strict=True):
            here = x[part]
            logits = (here if weight is None else F.linear(here, weight, bias)).to(wide)
            slope = temper.in_place(logits, slope=any(wanted))
            top = logits.amax(1, keepdim=True)
            chosen.append(logits.gather(1, right))
            mass = logits.sub_(top).exp_().sum(1, keepdim=True)
            tops.append(top)
            masses.append(mass)
            if any(wanted):
                logits.div_(mass)
                logits.scatter_add_(1, right, logits.new_full(right.shape, -1.0))
                if slope is not None:
                    logits.mul_(slope)
                if db is not None:
                    db += logits.sum(0)
                logits = logits.to(x.dtype)
                for place in to:
                    if weight is None:
                        place.copy_(logits)
                    else:
                        torch.mm(logits, weight, out=place)
                if dw is not None:
                    dw += (logits.T @ here).to(wide)
            del logits, slope  # else the next rows' logits would be made beside these
        ctx.save_for_backward(dx, dw, db, rows)
        ctx.shape, ctx.dtypes = x.shape, [None if t is None else t.dtype for t in (weight, bias)]
        return (torch.cat(masses).log_() + torch.cat(tops) - torch.cat(chosen)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, db, rows = ctx.saved_tensors
        whole = None
        if dx is not None:
            whole = dx.new_zeros(ctx.shape)
            whole[rows] = dx
            whole.mul_(upstream)
        dw, db = (None if d is None else (d * upstream).to(t) for d, t in zip((dw, db), ctx.dtypes, strict=True))
        return whole, dw, db, None, None, None
