"""Activations that keep their input alone, plain ones and gated ones, and tell how their output is made again.

    h = f(e)        h = f(e) * g

torch keeps e, f(e) and g of a gated one, and the linear layer after it keeps h where its update is trained: four
activations of the block's widest size, of which e and g give the other two.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.kernels.remade import remember

_aten = torch.ops.aten


class Activation(NamedTuple):
    """A function of one tensor, and `(upstream, e) -> gradient of e`."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _quick(e: Tensor) -> Tensor:
    return e * torch.sigmoid(1.702 * e)


def _quick_backward(upstream: Tensor, e: Tensor) -> Tensor:
    gate = torch.sigmoid(1.702 * e)
    return upstream * (gate * (1 + 1.702 * e * (1 - gate)))


ACTIVATIONS = {
    "silu": Activation(F.silu, _aten.silu_backward),
    "gelu": Activation(F.gelu, partial(_aten.gelu_backward, approximate="none")),
    "gelu-tanh": Activation(partial(F.gelu, approximate="tanh"), partial(_aten.gelu_backward, approximate="tanh")),
    "gelu-quick": Activation(_quick, _quick_backward),
    "relu": Activation(F.relu, lambda upstream, e: upstream * (e > 0)),
}


def activated(e: Tensor, name: str) -> Tensor:
    """Return `f(e)`."""
    h: Tensor = _Activated.apply(e, name)  # type: ignore[no-untyped-call]
    return remember(h, ACTIVATIONS[name].forward, e)


def gated(e: Tensor, g: Tensor, name: str) -> Tensor:
    """Return `f(e) * g`."""
    h: Tensor = _Gated.apply(e, g, name)  # type: ignore[no-untyped-call]
    return remember(h, partial(_product, name), e, g)


def _product(name: str, e: Tensor, g: Tensor) -> Tensor:
    return ACTIVATIONS[name].forward(e).mul_(g)


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, e: Tensor, name: str) -> Tensor:
        ctx.name = name
        ctx.save_for_backward(e)
        return ACTIVATIONS[name].forward(e)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return ACTIVATIONS[ctx.name].backward(upstream, *ctx.saved_tensors), None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, e: Tensor, g: Tensor, name: str) -> Tensor:
        ctx.name = name
        ctx.save_for_backward(e, g)
        return _product(name, e, g)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        e, g = ctx.saved_tensors
        f = ACTIVATIONS[ctx.name]
        e_grad = f.backward(upstream * g, e) if ctx.needs_input_grad[0] else None
        g_grad = f.forward(e).mul_(upstream) if ctx.needs_input_grad[1] else None
        return e_grad, g_grad, None
