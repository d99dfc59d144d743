"""Write a safetensors file tensor by tensor: the header is known beforehand, and each tensor may go once it is written.

safetensors' own writer wants all tensors of a file at once, which for a large model is five gigabytes of memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorakit.errors import AdapterFileError
from lorakit.persist.atomic import write_pieces

STORED: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""safetensors' names of the dtypes a base is kept in."""
FLOATING = frozenset({"F64", "F32", "F16", "BF16"})
"""Those of dense weights; a base in 8 bits or fewer has scales beside it, and is quantised."""

FORMAT = {"format": "pt"}
"""The metadata transformers and PEFT look for."""


@dataclass(frozen=True)
class Slot:
    """What a tensor takes of a file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Return the number of bytes.

        Raises:
            AdapterFileError: a dtype that is not known here.
        """
        if self.dtype not in STORED:
            raise AdapterFileError(f"tensors of dtype {self.dtype} are not known here; known: {', '.join(STORED)}")
        return math.prod(self.shape) * STORED[self.dtype].itemsize


def name_of(dtype: torch.dtype) -> str:
    """Return safetensors' name of a dtype."""
    return next(name for name, known in STORED.items() if known == dtype)


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = FORMAT) -> int:
    """Write tensors as a safetensors file and return its size in bytes; those that share memory are each written out.

    Raises:
        AdapterFileError: the write failed, or a dtype that is not known here.
    """
    slots = {name: Slot(name_of(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_shard(file, slots, tensors.__getitem__, metadata)


def write_shard(
    file: Path, slots: Mapping[str, Slot], read: Callable[[str], Tensor], metadata: Mapping[str, str] = FORMAT
) -> int:
    """Write a safetensors file, asking `read` for each tensor when its turn comes; return its size in bytes.

    The widest dtypes come first, each by name, as safetensors itself orders them, so that every tensor is aligned.

    Raises:
        AdapterFileError: the write failed, or a dtype that is not known here.
    """
    order = sorted(slots, key=lambda name: (-STORED.get(slots[name].dtype, torch.uint8).itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        begin, end = end, end + slots[name].bytes
        header[name] = {"dtype": slots[name].dtype, "shape": list(slots[name].shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)

    def pieces() -> Iterator[memoryview]:
        yield memoryview(len(head).to_bytes(8, "little") + head)
        for name in order:
            yield _raw(read(name), name, slots[name])  # no name for the tensor: it goes when it is written

    size = 8 + len(head) + end
    write_pieces(file, pieces(), size)
    return size


def _raw(tensor: Tensor, name: str, slot: Slot) -> memoryview:
    found = Slot(name_of(tensor.dtype), tuple(tensor.shape))
    assert found == slot, f"{name}: {found}, announced as {slot}"
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
