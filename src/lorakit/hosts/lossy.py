"""Stores that keep a weight in fewer bits than it has: reading gives a dense copy in fp32, writing rounds again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.host import Store
from lorakit.errors import MergeError
from lorakit.hosts import int8, nf4
from lorakit.hosts.bnb import quantized_of, row_scaled_of, take, take_rows
from lorakit.hosts.linear4bit import Linear4bit


class Lossy(Store):
    """What all of them say alike."""

    lossless = False

    def like(self, module: nn.Module) -> Tensor:
        """Return an empty fp32 tensor on the weight's device: a dense copy would cost eight times the layer."""
        return torch.empty(0, dtype=torch.float32, device=module.weight.device)  # type: ignore[arg-type]


class Packed(Lossy):
    """lorakit's own `Linear4bit`."""

    def read(self, module: nn.Module) -> Tensor:
        """Return the weight the product uses."""
        assert isinstance(module, Linear4bit)
        return module.dense(torch.float32)

    def write(self, module: nn.Module, weight: Tensor) -> None:
        """Quantise `weight` as the one before was, and take it."""
        assert isinstance(module, Linear4bit)
        module.take(_packed_like(module.quantized, weight - module.principal()))


class Bnb4bit(Lossy):
    """`bitsandbytes.nn.Linear4bit`."""

    def read(self, module: nn.Module) -> Tensor:
        """Return the dequantised weight, also where its layer was rearranged for a processor's kernel."""
        return nf4.dequantize(quantized_of(module), torch.float32)

    def write(self, module: nn.Module, weight: Tensor) -> None:
        """Quantise `weight` as the one before was, and give it to the layer."""
        take(module, _packed_like(quantized_of(module), weight))


class Bnb8bit(Lossy):
    """`bitsandbytes.nn.Linear8bitLt`, whose own product may round its input as well (LLM.int8)."""

    def read(self, module: nn.Module) -> Tensor:
        """Return the dequantised weight."""
        return int8.dequantize(row_scaled_of(module), torch.float32)

    def write(self, module: nn.Module, weight: Tensor) -> None:
        """Quantise `weight` by row and give it to the layer."""
        take_rows(module, int8.quantize(weight))


class TorchAO(Lossy):
    """A linear layer whose weight is one of torchao's quantised tensors."""

    def read(self, module: nn.Module) -> Tensor:
        """Return what the tensor dequantises to."""
        weight: Any = module.weight
        dense: Tensor = weight.dequantize()
        return dense.float()

    def write(self, module: nn.Module, weight: Tensor) -> None:
        """Refuse: how the tensor was quantised is torchao's to know."""
        kind = type(module.weight).__name__
        raise MergeError(f"torchao's {kind} cannot be written to; merge into the 16-bit base, then quantise that")


def _packed_like(old: nf4.Quantized, weight: Tensor) -> nf4.Quantized:
    """Return `weight` quantised as another one was."""
    return nf4.quantize(weight.to(old.dtype), old.block_size, old.nested is not None, old.kind)
