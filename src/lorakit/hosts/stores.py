"""The ways a dense weight is kept: as it is, or transposed."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from lorakit.core.host import Store


class Plain(Store):
    """`module.weight` is canonical."""

    def read(self, module: nn.Module) -> Tensor:
        """Return the weight itself."""
        return cast(Tensor, module.weight)

    @torch.no_grad()
    def write(self, module: nn.Module, weight: Tensor) -> None:
        """Copy `weight` into the module's."""
        cast(Tensor, module.weight).copy_(weight)


class Transposed(Store):
    """`module.weight` is `(in, out)`: GPT-2's Conv1D and every embedding table."""

    def read(self, module: nn.Module) -> Tensor:
        """Return the transposed view."""
        return cast(Tensor, module.weight).T

    @torch.no_grad()
    def write(self, module: nn.Module, weight: Tensor) -> None:
        """Copy the transpose of `weight` into the module's."""
        cast(Tensor, module.weight).copy_(weight.T)
