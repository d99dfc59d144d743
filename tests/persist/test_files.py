"""Broken files say by name what is wrong with them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lorakit.errors import AdapterFileError
from lorakit.persist import files, load, save
from lorakit.persist.shard import write_tensors
from tests.persist.samples import adapter


def weights(format: str) -> str:
    return "adapter_model.safetensors" if format == "peft" else "adapter.lorakit.safetensors"


@pytest.mark.parametrize("format", ["peft", "native"])
@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 60, 0.5, -1])
def test_a_truncated_file_is_named(format: Any, keep: float, tmp_path: Path) -> None:
    save(adapter(), tmp_path, format)
    (tmp_path / "lorakit.json").unlink(missing_ok=True)  # its checksum would notice first
    file = tmp_path / weights(format)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(AdapterFileError) as caught:
        load(tmp_path)
    assert str(file) in str(caught.value)
    assert ("is empty (0 bytes)" if keep == 0 else "is truncated") in str(caught.value)


def test_how_much_is_missing_is_said(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    write_tensors(file, {"w": torch.zeros(100)}, {})
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    with pytest.raises(AdapterFileError, match=f"is truncated: {len(data) - 100} of {len(data)} bytes"):
        files.read_safetensors(file)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"garbage that is long enough to have a header", "is not a safetensors file, or its header is corrupt"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer.*git lfs pull"),
        ((20).to_bytes(8, "little") + b'{"w": {"dtype": "F32', "has a corrupt header"),
        ((2).to_bytes(8, "little") + b"{}" + b"more", "is corrupt"),
        (b"PK\x03\x04" + bytes(60), "is not a safetensors file"),
    ],
)
def test_a_corrupt_file_is_named(data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(AdapterFileError, match=rf"x\.safetensors {said}"):
        files.read_safetensors(tmp_path / "x.safetensors")


def test_a_flipped_bit_in_a_saved_adapter_is_noticed(tmp_path: Path) -> None:
    save(adapter(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(AdapterFileError) as caught:
        load(tmp_path)
    assert f"{file} was changed after it was saved" in str(caught.value)
    assert "remove lorakit.json to accept the change" in str(caught.value)
    (tmp_path / "lorakit.json").unlink()
    load(tmp_path)


def test_a_missing_file_and_a_folder_in_its_place_are_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"x\.safetensors is missing"):
        files.read_safetensors(tmp_path / "x.safetensors")
    with pytest.raises(AdapterFileError, match="could not be read: Is a directory"):
        files.read_json(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [("", r"is empty \(0 bytes\)"), ('{"r": 8,', "is truncated or not JSON.*line 1"), ("[1]", "holds a JSON list")],
)
def test_broken_json_is_named(text: str, said: str, tmp_path: Path) -> None:
    save(adapter(), tmp_path)
    (tmp_path / "lorakit.json").unlink()
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterFileError, match=rf"adapter_config\.json {said}"):
        load(tmp_path)


class Bomb:
    """A pickle that would run code."""

    fired = False

    def __reduce__(self) -> tuple[Any, ...]:
        return setattr, (Bomb, "fired", True)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"w": Bomb()}, tmp_path / "x.bin")
    with pytest.raises(AdapterFileError, match=r"x\.bin was refused: pickles are not executed here"):
        files.read_pickle(tmp_path / "x.bin")
    (tmp_path / "y.bin").write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(AdapterFileError, match=r"y\.bin was refused"):
        files.read_pickle(tmp_path / "y.bin")
    assert not Bomb.fired


@pytest.mark.parametrize("keep", [0, 2, 0.3, 0.9])
def test_a_truncated_pickle_is_named(keep: float, tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(400)}, tmp_path / "x.bin")
    data = (tmp_path / "x.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(AdapterFileError, match=r"x\.bin (is empty|is truncated or corrupt|was refused)"):
        files.read_pickle(tmp_path / "x.bin")


def test_a_pickle_of_something_else_says_what_it_holds(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.zeros(2)}, "step": 3}, tmp_path / "x.bin")
    with pytest.raises(AdapterFileError, match="does not hold tensors by name, but model, step"):
        files.read_pickle(tmp_path / "x.bin")


def test_tensors_that_share_memory_are_each_written_out(tmp_path: Path) -> None:
    whole = torch.randn(4, 6)
    given = {"whole": whole, "view": whole[1:3], "turned": whole.T, "again": whole}
    write_tensors(tmp_path / "x", given)
    found, metadata = files.read_safetensors(tmp_path / "x")
    assert all(torch.equal(found[name], tensor) for name, tensor in given.items())
    assert metadata == {"format": "pt"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"r": ' + "9" * 5000 + "}", "an integer of more than 4,300 digits"),
        ('{"r": ' + "[" * 100_000, "brackets nested too deeply"),
        ('{"r": 1', "Expecting ',' delimiter at line 1 column 8"),
        ('{"r": "\xff"}', "not UTF-8 text"),
    ],
)
@pytest.mark.parametrize("name", ["adapter_config.json", "lorakit.json"])
def test_json_that_cannot_be_read_is_named(name: str, text: str, said: str, tmp_path: Path) -> None:
    save(adapter(), tmp_path)
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(AdapterFileError) as caught:
        load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name} is truncated or not JSON: {said}")


def test_a_header_that_cannot_be_read_is_corrupt(tmp_path: Path) -> None:
    header = b'{"w": ' + b"[" * 100_000
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(AdapterFileError, match="has a corrupt header"):
        files.read_safetensors(tmp_path / "x.safetensors")


MIXED = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)


@pytest.mark.parametrize("dtypes", [MIXED[:1], MIXED[1:2], MIXED[:3], MIXED[4:6], MIXED], ids=str)
def test_a_file_is_read_as_safetensors_reads_it(dtypes: tuple[torch.dtype, ...], tmp_path: Path) -> None:
    given = {f"{i}.{dtype}": torch.randint(0, 2, (3, 5 + i)).to(dtype) for i, dtype in enumerate(dtypes)}
    given |= {f"{i}.flat": torch.randint(0, 99, (8,)).to(dtype) for i, dtype in enumerate(dtypes)}
    safetensors.torch.save_file(given, tmp_path / "a.safetensors", {"made": "here"})
    found, said = files.read_safetensors(tmp_path / "a.safetensors")
    assert said == {"made": "here"}
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    next(iter(found.values())).fill_(1)  # each can be written to, and is alone in its place
    assert all(torch.equal(found[name], given[name]) for name in list(found)[1:])
    safetensors.torch.save_file(found, tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        {"a": ("F32", [2], [0, 8]), "b": ("F32", [2], [4, 12])},  # b begins inside a
        {"a": ("F32", [2], [0, 8]), "b": ("F32", [1], [12, 16])},  # nothing is between them
        {"a": ("F32", [3], [0, 8])},
        {"a": ("F32", [2], [0, 8])},  # more bytes follow
        {"a": ("F32", [-2], [0, 8])},
        {"a": ("F32", "xx", [0, 16])},
        {"a": ("F32", None, [0, 16])},
        {"a": ("F32", [4.0], [0, 16])},
        {"a": (["F32"], [4], [0, 16])},
        {"a": ("F32", [4], ["0", 16])},
        {"a": ("F32", [4], [0, 16, 16])},
    ],
)
def test_tensors_that_do_not_fill_the_file_are_corrupt(header: dict[str, Any], tmp_path: Path) -> None:
    named = {name: dict(zip(("dtype", "shape", "data_offsets"), value, strict=True)) for name, value in header.items()}
    text = json.dumps(named).encode()
    text += b" " * (-len(text) % 8)
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(AdapterFileError, match="a.safetensors is corrupt"):
        files.read_safetensors(file)
