"""Slices of a fused layer as one LoRA of the whole layer, and back.

PEFT knows one product per module. A sum of products on row slices is one such product exactly: the downs are stacked,
the ups stand on their own rows in their own columns, and the ranks add up:

    rows 0:4  s B1 A1      ->   up = [B1  0]   down = [A1]   rank r1 + r2, scale s
    rows 4:8  s B2 A2               [ 0 B2]          [A2]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lorakit.core.method import Method
from lorakit.core.state import Update
from lorakit.errors import AdapterFileError


def alpha_for(scale: float, rank: int, stabilised: bool) -> float:
    """Return the alpha with which a LoRA of this rank has this scale: `s r`, or `s sqrt(r)` when stabilised."""
    return scale * (math.sqrt(rank) if stabilised else rank)


def gathers(method: Method) -> bool:
    """Return whether slices of this method add up to one of the whole layer: plain pairs under PEFT's LORA."""
    form = method.peft
    return form is not None and form.type == "LORA" and form.flag is None and set(form.keys) == {"down", "up"}


def gather(updates: Sequence[Update]) -> Update:
    """Return the LoRA updates of one layer, one whole or several on its rows, as one update of the whole layer.

    Raises:
        AdapterFileError: rows of a grouped convolution, or of a layer whose height the site does not tell.
    """
    first = updates[0]
    if first.site.rows is None:
        return first
    path, height = first.site.path, first.site.height
    if any(u.site.rows is None or u.site.fused_out is None for u in updates):
        raise AdapterFileError(
            f"{path}: the sites of its rows do not tell the height of the layer; make them with slice()"
        )
    if first.site.groups != 1:
        raise AdapterFileError(f"{path}: PEFT has no form for rows of a grouped convolution")
    scale = _scale(first.method)
    rank = sum(_rank(u.method) for u in updates)
    up = first.tensors["up"].new_zeros(height, rank)
    column = 0
    for update in updates:
        start, stop = update.site.rows or (0, height)
        r, own = _rank(update.method), _scale(update.method)
        block = update.tensors["up"]
        up[start:stop, column : column + r] = block if own == scale else block * (own / scale)
        column += r
    method: Any = first.method
    whole = replace(method, rank=rank, alpha=alpha_for(scale, rank, method.stabilised))
    site = replace(first.site, out=height, rows=None, fused_out=None)
    return Update(site, whole, {"down": torch.cat([u.tensors["down"] for u in updates]), "up": up})


def split(whole: Update, parts: Sequence[tuple[tuple[int, int], Method]]) -> tuple[Update, ...]:
    """Return the slices `gather` made `whole` of, given the rows and the method of each in order.

    Raises:
        AdapterFileError: the parts do not add up to the whole.
    """
    path, column, found = whole.site.path, 0, []
    scale = _scale(parts[0][1])
    for (start, stop), method in parts:
        r, own = _rank(method), _scale(method)
        block = whole.tensors["up"][start:stop, column : column + r].clone()
        tensors = {
            "down": whole.tensors["down"][column : column + r].clone(),
            "up": block if own == scale else block * (scale / own),
        }
        found.append(Update(whole.site.slice(start, stop), method, tensors))
        column += r
    if column != _rank(whole.method):
        raise AdapterFileError(f"{path}: its slices have rank {column} together, the file has {_rank(whole.method)}")
    return tuple(found)


def _rank(method: Method) -> int:
    return int(getattr(method, "rank"))  # noqa: B009 - methods are reached through the registry, so by field name


def _scale(method: Method) -> float:
    return float(getattr(method, "scale"))  # noqa: B009
