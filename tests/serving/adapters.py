"""Folders of tiny adapters for tests of the server."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from lorakit import AdapterSpec, LoRA, Targets, save
from lorakit.core.site import Site
from lorakit.core.state import AdapterState, Base, Purpose, Update


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
