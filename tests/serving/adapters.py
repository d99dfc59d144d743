"""Folders of tiny adapters for tests of the server."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from lorakit import AdapterSpec, LoRA, Targets, save
from lorakit.core.site import Site
from lorakit.core.state import AdapterState, Base, Purpose, Update
from lorakit.serving.shelf.arrival import describe
from lorakit.serving.shelf.manifest import File, Golden, Manifest, digest_of
from lorakit.serving.shelf.store import Store


def tiny(value: float = 0.0, rank: int = 2) -> AdapterState:
    """Return a LoRA of one 4 x 4 layer whose numbers are all `value`."""
    method = LoRA(rank, 4.0)
    site = Site("model.layers.0.self_attn.q_proj", 4, 4)
    tensors = {name: torch.full(decl.shape, value) for name, decl in method.tensors(site).items()}
    base = Base("some/base", {site.path: (0.5, -1.25)})
    return AdapterState(AdapterSpec(method, Targets("q_proj")), (Update(site, method, tensors),), {}, base, Purpose())


def folder_of(place: Path, value: float = 0.0, rank: int = 2, format: Literal["peft", "native"] = "peft") -> Path:
    """Write a tiny adapter into a folder and return the folder."""
    save(tiny(value, rank), place, format)
    return place


def with_golden(folder: Path, *golden: Golden) -> Path:
    """Write a manifest with golden prompts beside the adapter in a folder, and return the folder."""
    (folder / "manifest.json").write_text(replace(describe(folder), golden=golden).text())
    return folder


def shelve(store: Store, size: int, count: int = 1, golden: tuple[Golden, ...] = ()) -> list[str]:
    """Put files of `size` bytes into a store behind its back, as adapters, and return their digests."""
    digests = []
    for number in range(count):
        content = number.to_bytes(4, "big") + bytes(size - 4)
        files = {"adapter_model.safetensors": File(hashlib.sha256(content).hexdigest(), size)}
        digest = digest_of({name: file.sha256 for name, file in files.items()})
        place = store.root / "adapters" / digest
        place.mkdir()
        (place / "adapter_model.safetensors").write_bytes(content)
        manifest = Manifest(digest, files, Base(), "lora", 2, 0, "2026-01-02T03:04:05+00:00", golden=golden)
        (place / "manifest.json").write_text(manifest.text())
        digests.append(digest)
    return digests
