"""Dropout whose mask is made again from its seed: nothing of it is kept, and a value costs 8 random bits.

Eight bits know rates of whole 256ths. A call takes one of the two around the rate asked for, by chance, so that the
rate is right on the average over calls; the factor of what is kept is always that of the rate taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.core.hollow import is_hollow

LEVELS = 2**8


def draw_seed(like: Tensor) -> int:
    """Return a seed from torch's global generator of the CPU, which a checkpoint restores; no device is waited for."""
    return 0 if is_hollow(like) else int(torch.randint(2**62, (), device="cpu"))


def keep_mask(like: Tensor, rate: float, seed: int) -> tuple[Tensor, float]:
    """Return a mask shaped like `like`, False where a value is dropped, and what the others are multiplied by."""
    dropped = min(LEVELS - 1, int(rate * LEVELS + seed % 2**24 / 2**24))
    rng = torch.Generator(device=like.device).manual_seed(seed)
    words = torch.empty(-(-like.numel() // 8), dtype=torch.int64, device=like.device)
    words.random_(-(2**63), None, generator=rng)
    kept = words.view(torch.uint8)[: like.numel()].view(like.shape) >= dropped
    return kept, LEVELS / (LEVELS - dropped)
