"""Layers that bitsandbytes quantised: their weights as lorakit's values, and back.

With `bnb_kernels` this is all that names the package, and neither imports it before a layer of its own is there.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
from torch import nn

from lorakit.errors import AttachError
from lorakit.hosts.bnb_keys import to_tensors
from lorakit.hosts.int8 import RowScaled
from lorakit.hosts.nf4 import Nested, Quantized


def is_layer(module: nn.Module, name: str) -> bool:
    """Return whether this is bitsandbytes' layer of that name, or a subclass, without importing the package."""
    return any(c.__name__ == name and c.__module__.startswith("bitsandbytes.nn") for c in type(module).__mro__)


def quantized_of(module: Any) -> Quantized:
    """Return the weight of a `bitsandbytes.nn.Linear4bit` as a value; a layer that was never moved has no codes yet."""
    state, packed = module.weight.quant_state, module.weight.data
    if state is None:
        raise AttachError(
            "a bitsandbytes layer holds a weight that is not quantised yet; move the model to its device first"
        )
    if getattr(state, "packing_format_for_cpu", False):  # in evaluation on some processors, in place
        functional: Any = importlib.import_module("bitsandbytes.functional")
        packed, state = functional._convert_weight_packed_for_cpu_inverse(packed, copy.copy(state))
    nested = Nested(state.state2.absmax, state.offset) if state.nested else None
    return Quantized(
        packed.view(torch.uint8).view(-1, 1), state.absmax, nested, tuple(state.shape), state.dtype, state.blocksize,
        state.quant_type,
    )  # fmt: skip


def take(module: Any, value: Quantized) -> None:
    """Give a `bitsandbytes.nn.Linear4bit` another quantised weight."""
    nn_: Any = importlib.import_module("bitsandbytes.nn")
    tensors = {name: tensor for name, tensor in to_tensors(value).items() if name}
    module.weight = nn_.Params4bit.from_prequantized(value.packed, tensors, device=value.packed.device, module=module)


def row_scaled_of(module: Any) -> RowScaled:
    """Return the weight of a `bitsandbytes.nn.Linear8bitLt` as a value."""
    scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    if scales is None or module.weight.dtype != torch.int8:
        raise AttachError(
            "a bitsandbytes layer holds a weight that is not quantised yet; move the model to its device first"
        )
    return RowScaled(module.weight.data, scales, torch.float32)


@torch.no_grad()
def take_rows(module: Any, value: RowScaled) -> None:
    """Give a `bitsandbytes.nn.Linear8bitLt` another quantised weight, in place."""
    before = row_scaled_of(module)
    before.codes.copy_(value.codes)
    before.absmax.copy_(value.absmax)
