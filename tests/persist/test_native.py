"""lorakit's own format keeps everything, bit for bit, and lists what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.core.site import Site
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.core.state import AdapterState
from lorakit.errors import AdapterFileError
from lorakit.methods.lora import LoRA
from lorakit.persist import files, load, save
from lorakit.persist.native import NATIVE
from lorakit.persist.shard import write_tensors
from tests.persist.samples import adapter, lora_update, same, slices


def convolution() -> AdapterState:
    site = Site("down.0", 8, 3, (3, 3), kind="conv2d", groups=2)
    return AdapterState(AdapterSpec(LoRA(4), Targets("down.0")), (lora_update(site, LoRA(4)),))


@pytest.mark.parametrize("make", [adapter, slices, convolution])
def test_every_adapter_comes_back_bit_for_bit(make: Any, tmp_path: Path) -> None:
    before = make()
    save(before, tmp_path, "native")
    assert same(load(tmp_path), before)
    assert same(load(tmp_path / NATIVE), before)


def test_dtypes_are_kept(tmp_path: Path) -> None:
    state = adapter()
    halves = tuple(replace(u, tensors={n: t.bfloat16() for n, t in u.tensors.items()}) for u in state.updates)
    save(replace(state, updates=halves), tmp_path, "native")
    assert {t.dtype for u in load(tmp_path).updates for t in u.tensors.values()} == {torch.bfloat16}


def test_every_misfit_is_listed(tmp_path: Path) -> None:
    save(adapter(), tmp_path, "native")
    tensors, metadata = files.read_safetensors(tmp_path / NATIVE)
    tensors["h.0.attn.q.down"] = torch.zeros(3, 5)
    tensors["h.1.attn.q.up"][0, 0] = float("nan")
    tensors["h.1.attn.q.gain"] = torch.zeros(1)
    del tensors["h.0.attn.q.up"]
    write_tensors(tmp_path / NATIVE, tensors, metadata)
    with pytest.raises(AdapterFileError) as caught:
        load(tmp_path)
    for line in (
        f"{NATIVE}: 4 adapter tensor(s) do not fit",
        "h.0.attn.q.down: shape (3, 5), expected (4, 5)",
        "h.0.attn.q.up: missing, expected shape (6, 4)",
        "h.1.attn.q.gain: not a tensor of lora",
        "h.1.attn.q.up: holds NaN or infinity",
    ):
        assert line in str(caught.value)


def test_tensors_of_no_site_are_listed(tmp_path: Path) -> None:
    save(adapter(), tmp_path, "native")
    tensors, metadata = files.read_safetensors(tmp_path / NATIVE)
    tensors["h.7.attn.q.down"] = tensors.pop("trained:score.weight")
    write_tensors(tmp_path / NATIVE, tensors, metadata)
    with pytest.raises(AdapterFileError) as caught:
        load(tmp_path)
    assert "trained:score.weight: missing" in str(caught.value)
    assert "h.7.attn.q.down: extra, of no site of this adapter" in str(caught.value)


def test_another_version_and_another_file_are_named(tmp_path: Path) -> None:
    save(adapter(), tmp_path, "native")
    tensors, metadata = files.read_safetensors(tmp_path / NATIVE)
    head = json.loads(metadata["lorakit"])
    for change, said in (({"format": 9}, "has format 9, this lorakit reads 1"), ({"sites": None}, "is damaged")):
        write_tensors(tmp_path / NATIVE, tensors, {"lorakit": json.dumps({**head, **change})})
        with pytest.raises(AdapterFileError, match=said):
            load(tmp_path)
    write_tensors(tmp_path / NATIVE, tensors, {})
    with pytest.raises(AdapterFileError, match="is a safetensors file, but not a lorakit adapter"):
        load(tmp_path)


def test_equal_adapters_give_equal_bytes(tmp_path: Path) -> None:
    for name in "abc":
        save(adapter(1.0), tmp_path / name, "native")
    assert len({(tmp_path / name / NATIVE).read_bytes() for name in "abc"}) == 1
