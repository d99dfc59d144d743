"""The three ways a weight acts on an input: matrix product, table lookup, convolution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.host import Op


class MatrixProduct(Op):
    """`y (..., out) = x (..., in) W^T`."""

    axis = -1

    def apply(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """Return `x @ weight.T`."""
        return F.linear(x, weight)

    def mix(self, module: nn.Module, hidden: Tensor, up: Tensor) -> Tensor:
        """Return `hidden @ up.T`."""
        return F.linear(hidden, up)

    def channel(self, values: Tensor, like: Tensor) -> Tensor:
        """Return `values`: the features are last."""
        return values


class Lookup(Op):
    """`y (..., out) = W[:, x]` for integer x; some models multiply the row by a constant `embed_scale`."""

    axis = -1

    def apply(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """Return the columns of `weight (out, vocabulary)` that `x` names."""
        row = F.embedding(x, weight.T, padding_idx=module.padding_idx)  # type: ignore[arg-type]
        scale = getattr(module, "embed_scale", None)
        return row if scale is None else row * scale

    def mix(self, module: nn.Module, hidden: Tensor, up: Tensor) -> Tensor:
        """Return `hidden @ up.T`."""
        return F.linear(hidden, up)

    def channel(self, values: Tensor, like: Tensor) -> Tensor:
        """Return `values`: the features are last."""
        return values


class Convolution(Op):
    """`y (batch, out, *space) = W * x` with the module's own stride, padding, dilation and groups."""

    def __init__(self, dims: int) -> None:
        self.dims = dims
        self.axis = -1 - dims
        self._conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]

    def apply(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """Return the module's convolution with another weight and no bias."""
        result: Tensor = module._conv_forward(x, weight, None)  # type: ignore[operator]
        return result

    def mix(self, module: nn.Module, hidden: Tensor, up: Tensor) -> Tensor:
        """Return the 1 x ... x 1 convolution by `up (out, r / groups)`, each group on its own channels."""
        return self._conv(hidden, up.reshape(*up.shape, *[1] * self.dims), groups=int(module.groups))  # type: ignore[arg-type]

    def channel(self, values: Tensor, like: Tensor) -> Tensor:
        """Return `values (out,)` as `(out, 1, ...)`."""
        return values.view(-1, *[1] * self.dims)
