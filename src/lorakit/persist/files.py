"""Readers that name the file they reject and say plainly what is wrong with it: missing, empty, truncated, corrupt.

Tensors come from safetensors, or from a pickle that is allowed to hold tensors alone; nothing in a file is executed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as _tensors_of
from torch import Tensor

from lorakit.core.jsontext import JsonFault, parse_json
from lorakit.errors import AdapterFileError, listing
from lorakit.persist.atomic import atomic_directory, resting, write_file

__all__ = [
    "atomic_directory",
    "read_json",
    "read_pickle",
    "read_safetensors",
    "resting",
    "sha256",
    "to_json",
    "write_file",
]


_NUMPY_HAS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "U8": np.dtype(np.uint8),
}
IN_8_BITS = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
"""Dtypes of tensors that are computed with in fp32."""


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return `(tensors, metadata)` of a safetensors file; what is kept in 8 bits as fp32.

    Raises:
        AdapterFileError: naming the file and whether it is missing, unreadable, empty, truncated or corrupt.
    """
    data = _read_whole(Path(path))
    try:
        header = _sound_header(data)
    except ValueError as bad:
        raise AdapterFileError(f"{path} {bad}") from None
    try:
        tensors = _views(data, header) or _tensors_of(bytes(data))
    except (SafetensorError, ValueError, KeyError, RuntimeError) as bad:
        raise AdapterFileError(f"{path} is corrupt: {bad}; get the file again") from bad
    wide = {name: t.to(torch.float32) if t.dtype in IN_8_BITS else t for name, t in tensors.items()}
    return wide, dict(header.get("__metadata__", {}))


def _views(data: bytearray, header: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Return the tensors as views of a file's bytes; None of a file not laid out as safetensors writes it.

    No call of torch is made for them, each of which lets other threads go first, a server's engine for instance. Of
    dtypes numpy has not there are none either.
    """
    start = at = 8 + int.from_bytes(data[:8], "little")
    found: dict[str, Tensor] = {}
    try:
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype, shape, (begin, end) = _NUMPY_HAS.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
            count = math.prod(shape)
            if dtype is None or not count or start + begin != at or end - begin != count * dtype.itemsize or at % 8:
                return None
            found[name] = torch.from_numpy(np.frombuffer(data, dtype, count, at).reshape(shape))
            at = start + end
    except (KeyError, TypeError, ValueError):  # values of other types: the library says what is wrong
        return None
    return found if at == len(data) else None


def stored_as(file: Path) -> set[str]:
    """Return safetensors' names of the dtypes in a file that can be read, from its header alone."""
    size = int.from_bytes(_read(file, 8), "little")
    header = _header(_read(file, 8 + size))
    return {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}


def narrowed(tensors: Mapping[str, Tensor], dtype: torch.dtype | None, but: Collection[str] = ()) -> dict[str, Tensor]:
    """Return tensors in another dtype, save those named in `but`; as they are without one.

    Raises:
        AdapterFileError: values that the dtype does not hold exactly.
    """
    if dtype is None:
        return dict(tensors)
    made = {name: t if name in but else t.to(dtype) for name, t in tensors.items()}
    if changed := [name for name, t in tensors.items() if not torch.equal(made[name].to(t.dtype), t)]:
        raise AdapterFileError(
            f"{dtype} does not hold these tensors exactly; compress to it first:\n{listing(changed)}"
        )
    return made


def read_pickle(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a torch file, read with `weights_only=True`: no code in it is executed.

    Raises:
        AdapterFileError: a file that is missing, truncated, or holds anything but named tensors.
    """
    if not _read(Path(path), 1):
        raise AdapterFileError(f"{path} is empty (0 bytes); get the file again")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as refused:
        reason = str(refused).split("\n")[0][:200]
        raise AdapterFileError(
            f"{path} was refused: pickles are not executed here, and this one holds more than tensors, or is corrupt "
            f"({reason}); convert it to safetensors where it was made"
        ) from refused
    except (RuntimeError, EOFError, ValueError, OSError, KeyError) as bad:
        raise AdapterFileError(
            f"{path} is truncated or corrupt: {str(bad).splitlines()[0][:200]}; get the file again"
        ) from bad
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        kind = ", ".join(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
        raise AdapterFileError(f"{path} does not hold tensors by name, but {kind[:200]}; save the state dict alone")
    return {str(name): tensor for name, tensor in found.items()}


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the JSON object in a file, keys in the file's order; raises `AdapterFileError` naming file and line."""
    data = _read(Path(path))
    try:
        value = parse_json(data)
    except JsonFault as bad:
        how = "is empty (0 bytes)" if not data else f"is truncated or not JSON: {bad}"
        raise AdapterFileError(f"{path} {how}") from bad
    if not isinstance(value, dict):
        raise AdapterFileError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise AdapterFileError(f"{path} holds half of a surrogate pair, which is no text") from None
    return value


def to_json(value: Mapping[str, Any]) -> str:
    """Return indented JSON that keeps the order of keys, so that equal values give equal bytes."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def sha256(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file, read a piece at a time."""
    digest = hashlib.sha256()
    with _opened(Path(path)) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _read(path: Path, most: int = -1) -> bytes:
    """Return the first `most` bytes of a file, or all of them."""
    with _opened(path) as file:
        return file.read(most)


def _read_whole(path: Path) -> bytearray:
    """Return a file's bytes, in memory that can be written to."""
    with _opened(path) as file:
        data = bytearray(os.fstat(file.fileno()).st_size)
        del data[file.readinto(data) :]
    return data


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """Open a file to read, and say of a failure which file it was."""
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise AdapterFileError(f"{path} is missing") from None
    except OSError as failed:
        raise AdapterFileError(f"{path} could not be read: {failed.strerror or failed}") from failed


def _sound_header(data: bytearray) -> dict[str, Any]:
    """Return the header of the bytes of a safetensors file; a ValueError says what is plainly wrong with them."""
    if not data:
        raise ValueError("is empty (0 bytes); get the file again")
    if data.startswith(b"version https://git-lfs"):
        raise ValueError("is a Git LFS pointer, not the file itself; run `git lfs pull`")
    if len(data) < 8:
        raise ValueError(f"is truncated: {len(data)} bytes are less than its header; get the file again")
    length = int.from_bytes(data[:8], "little")
    if length > 100_000_000 or (len(data) > 8 and data[8:9] != b"{"):
        raise ValueError("is not a safetensors file, or its header is corrupt; get the file again")
    if len(data) < 8 + length:
        raise ValueError(
            f"is truncated: {len(data):,} bytes end inside its header of {8 + length:,}; get the file again"
        )
    try:
        header = _header(data)
        whole = 8 + length + max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ValueError("has a corrupt header; get the file again") from None
    if len(data) < whole:
        raise ValueError(f"is truncated: {len(data):,} of {whole:,} bytes; get the file again")
    return header


def _header(data: bytes | bytearray) -> dict[str, Any]:
    header: dict[str, Any] = parse_json(bytes(data[8 : 8 + int.from_bytes(data[:8], "little")]))
    return header
