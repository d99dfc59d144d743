"""The ways a dense weight is kept: as it is, transposed, or not at all, where a module or a model is the host."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from lorakit.core.host import Store
from lorakit.errors import MergeError


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

    def like(self, module: nn.Module) -> Tensor:
        """Return the module's own weight, which has no two axes to transpose where it is divided."""
        return cast(Tensor, module.weight)

    def read(self, module: nn.Module) -> Tensor:
        """Return the transposed view."""
        return cast(Tensor, module.weight).T

    @torch.no_grad()
    def write(self, module: nn.Module, weight: Tensor) -> None:
        """Copy the transpose of `weight` into the module's."""
        cast(Tensor, module.weight).copy_(weight.T)


class Nothing(Store):
    """The host is a module of several layers: it has no weight of its own, only a device and a dtype."""

    def read(self, module: nn.Module) -> Tensor:
        """Return an empty tensor like the module's first parameter."""
        return next(module.parameters()).new_empty(0)

    def write(self, module: nn.Module, weight: Tensor) -> None:
        """Refuse: an update beside a whole module is no change of a weight."""
        raise MergeError(f"{type(module).__name__} has no weight to write to")


class Vocabulary(Store):
    """The host is a model: what it has of vectors to read are its input embeddings, `(vocabulary, width)`."""

    def read(self, module: nn.Module) -> Tensor:
        """Return the table of input embeddings, times `embed_scale` where looking one up multiplies by it."""
        layer = module.get_input_embeddings()  # type: ignore[operator]
        weight = cast(Tensor, layer.weight)
        return weight * layer.embed_scale if hasattr(layer, "embed_scale") else weight

    def write(self, module: nn.Module, weight: Tensor) -> None:
        """Refuse: what is read beside the input is no change of a weight."""
        raise MergeError(f"{type(module).__name__} reads an update beside its input; there is no weight to write to")
