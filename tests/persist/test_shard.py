"""A safetensors file written tensor by tensor is the file safetensors writes, and holds one tensor at a time."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from torch import Tensor

from lorakit.errors import AdapterFileError
from lorakit.persist.shard import STORED, Slot, name_of, write_shard


def slots_of(tensors: dict[str, Tensor]) -> dict[str, Slot]:
    """Return what tensors take of a file."""
    return {name: Slot(name_of(t.dtype), tuple(t.shape)) for name, t in tensors.items()}


def sample(dtype: torch.dtype, *shape: int) -> Tensor:
    """Return values of a dtype."""
    return torch.randint(0, 2, shape).to(dtype) if dtype == torch.bool else (10 * torch.randn(shape)).to(dtype)


def test_the_bytes_are_those_of_safetensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "model.norm.weight": sample(torch.bfloat16, 3),
        "b": sample(torch.float32, 2, 5),
        "a.größe": sample(torch.bfloat16, 4, 1, 2),
        "mask": sample(torch.uint8, 7),
        "step": torch.tensor(12),
        "none": torch.empty(0, 3),
    }
    size = write_shard(tmp_path / "x.safetensors", slots_of(tensors), tensors.__getitem__)
    written = (tmp_path / "x.safetensors").read_bytes()
    assert len(written) == size
    assert written == save(tensors, {"format": "pt"})


@given(st.lists(st.sampled_from(sorted(STORED)), max_size=6), st.integers(0, 3))
def test_what_is_written_is_what_is_read(dtypes: list[str], seed: int) -> None:
    import tempfile

    torch.manual_seed(seed)
    tensors = {f"t{i}": sample(STORED[dtype], 1 + i % 3, 5) for i, dtype in enumerate(dtypes)}
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder, "x.safetensors"), slots_of(tensors), tensors.__getitem__)
        found = load_file(Path(folder, "x.safetensors"))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))


def test_a_transposed_tensor_is_written_in_its_own_order(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T
    write_shard(tmp_path / "x.safetensors", slots_of({"t": tensor}), lambda name: tensor)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["t"], tensor)


def test_each_tensor_is_gone_before_the_next_is_asked_for(tmp_path: Path) -> None:
    alive: list[weakref.ref[np.ndarray]] = []  # type: ignore[type-arg]

    def read(name: str) -> Tensor:
        assert [ref for ref in alive if ref() is not None] == []
        values = np.ones(100, np.float32)  # the memory itself: a tensor may be gone while a view keeps what it held
        alive.append(weakref.ref(values))
        return torch.from_numpy(values)

    gc.disable()
    try:
        write_shard(tmp_path / "x.safetensors", {name: Slot("F32", (100,)) for name in "abcd"}, read)
    finally:
        gc.enable()
    assert len(alive) == 4


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"tensors of dtype F4 are not known here; known: F64, F32"):
        write_shard(tmp_path / "x.safetensors", {"t": Slot("F4", (2,))}, lambda name: torch.zeros(2))


def test_a_full_disk_says_how_much_the_file_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(AdapterFileError, match=r"could not write x.safetensors: No space left .* needs [\d,]+ bytes"):
        write_shard(tmp_path / "x.safetensors", {"t": Slot("F32", (2,))}, lambda name: torch.zeros(2))


def test_what_fails_while_a_tensor_is_made_is_not_taken_for_the_disk(tmp_path: Path) -> None:
    def broken(name: str) -> Tensor:
        raise OSError(5, "the base cannot be read")

    with pytest.raises(OSError, match="the base cannot be read"):
        write_shard(tmp_path / "x.safetensors", {"t": Slot("F32", (2,))}, broken)
