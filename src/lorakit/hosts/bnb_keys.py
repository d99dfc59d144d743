"""A quantised weight as tensors with bitsandbytes' names, so that either side reads what the other wrote.

weight, weight.absmax, weight.quant_map, weight.nested_absmax, weight.nested_quant_map,
weight.quant_state.bitsandbytes__nf4 (the rest, as JSON in a uint8 tensor)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import AdapterFileError
from lorakit.hosts.codebooks import BOOKS, dynamic_map
from lorakit.hosts.nf4 import NESTED, Nested, Quantized

_STATE = "quant_state.bitsandbytes__"
NAMES = frozenset({"absmax", "quant_map", "nested_absmax", "nested_quant_map", *(f"{_STATE}{kind}" for kind in BOOKS)})
"""What may stand behind `weight.` in a checkpoint."""


def to_tensors(value: Quantized) -> dict[str, Tensor]:
    """Return the tensors of a quantised weight, by what stands behind `weight.`; "" is the packed bytes."""
    device = value.packed.device
    state: dict[str, Any] = {
        "quant_type": value.kind,
        "blocksize": value.block_size,
        "dtype": str(value.dtype).removeprefix("torch."),
        "shape": list(value.shape),
    }
    tensors = {"": value.packed, "absmax": value.absmax, "quant_map": BOOKS[value.kind]().to(device, copy=True)}
    if value.nested is not None:
        state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": value.nested.offset.item()}
        tensors |= {
            "nested_absmax": value.nested.absmax,
            "nested_quant_map": dynamic_map().to(device, copy=True),
        }
    packed = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8, device=device)
    return {**tensors, f"{_STATE}{value.kind}": packed}


def from_tensors(tensors: Mapping[str, Tensor], where: str) -> Quantized:
    """Return the quantised weight of such tensors; the inverse of `to_tensors`.

    Args:
        tensors: by what stands behind `weight.`; "" is the packed bytes.
        where: what the error calls it.

    Raises:
        AdapterFileError: a part of the state is missing, or says what lorakit cannot read.
    """
    kind = next((name.removeprefix(_STATE) for name in tensors if name.startswith(_STATE)), None)
    if kind is None:
        raise AdapterFileError(
            f"{where}: packed weights without their quant_state, so nobody knows what the bytes mean; "
            "take the checkpoint as bitsandbytes or `lorakit quantize` wrote it"
        )
    state = _read(tensors[f"{_STATE}{kind}"], where)
    needed = {"", "absmax", *({"nested_absmax"} if "nested_offset" in state else ())}
    if missing := sorted(f"weight.{name}" if name else "weight" for name in needed - tensors.keys()):
        raise AdapterFileError(f"{where}: {', '.join(missing)} missing beside the quant_state")
    if state.get("nested_blocksize", NESTED) != NESTED or kind not in BOOKS:
        raise AdapterFileError(f"{where}: {kind} with {state} is no state that lorakit reads")
    if "quant_map" in tensors and not torch.equal(tensors["quant_map"].cpu().float(), BOOKS[kind]()):
        raise AdapterFileError(f"{where}: its quant_map is not that of {kind}; the file is damaged, or of another kind")
    nested = None
    if "nested_offset" in state:
        absmax = tensors["nested_absmax"].float()
        nested = Nested(absmax, absmax.new_tensor(float(state["nested_offset"])))
    shape, size = tuple(int(n) for n in state["shape"]), int(state["blocksize"])
    value = Quantized(tensors[""], tensors["absmax"], nested, shape, getattr(torch, state["dtype"]), size, kind)
    _check_sizes(value, where)
    return value


def _read(packed: Tensor, where: str) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(bytes(packed.cpu().tolist()))
        if not {"blocksize", "dtype", "shape"} <= state.keys():
            raise ValueError(f"it holds only {sorted(state)}")
    except ValueError as error:
        raise AdapterFileError(f"{where}: its quant_state cannot be read: {error}") from error
    return state


def _check_sizes(value: Quantized, where: str) -> None:
    """Raise `AdapterFileError` unless bytes and block maxima are as many as the shape needs."""
    n = torch.Size(value.shape).numel()
    expected = {
        "weight": (-(-n // 2), value.packed.numel()),
        "absmax": (-(-n // value.block_size), value.absmax.numel()),
    }
    if wrong := [
        f"{name} has {found} values, {need} expected" for name, (need, found) in expected.items() if need != found
    ]:
        raise AdapterFileError(f"{where}: for shape {value.shape} in blocks of {value.block_size}, {'; '.join(wrong)}")
