"""Dropout whose mask is made again from its seed: nothing of it is kept, and a value costs 8 random bits.

Eight bits know rates of whole 256ths. A call takes one of the two around the rate asked for, by chance, so that the
rate is right on the average over calls; the factor of what is kept is always that of the rate taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.core.hollow import is_hollow

LEVELS = 2**8
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def draw_seed(like: Tensor) -> int:
    """Return a seed from torch's global generator of the CPU, which a checkpoint restores; no device is waited for."""
    return 0 if is_hollow(like) else int(torch.randint(2**62, (), device="cpu"))


def dropout(x: Tensor, rate: float) -> Tensor:
    """Return `x (..., width)` with values dropped at `rate` and the others lifted, so that the average is `x`.

    torch's own keeps its mask, and on a CPU makes it with one lane. Source: Srivastava et al., JMLR 2014, section 4.
    """
    y: Tensor = _Dropout.apply(x, rate, draw_seed(x))  # type: ignore[no-untyped-call]
    return y


def dropped(x: Tensor, rate: float, seed: int) -> Tensor:
    """Return `x (..., width)` times the mask of this seed, lifted; no gradient is known for it here."""
    rows = x.reshape(-1, x.shape[-1])
    mask, factor = keep_mask(rows, rows.shape[1], rate, seed)
    return mask.mul_(rows).mul_(factor).view(x.shape)


def keep_mask(like: Tensor, width: int, rate: float, seed: int) -> tuple[Tensor, float]:
    """Return ones, and zeros for the values that are dropped, `(rows of like, width)`, and the factor of the others.

    They are made of bytes, never of bools, which torch makes and reads several times slower on a CPU.
    """
    dropped = min(LEVELS - 1, int(rate * LEVELS + seed % 2**24 / 2**24))
    count = len(like) * width
    words = random_words(-(-count // 8), seed, like.device)
    bits = words.view(torch.uint8)[:count].view(len(like), width)
    mask = bits.clamp_(dropped - 1, dropped).sub_(dropped - 1) if dropped else bits.fill_(1)
    return mask.to(like.dtype), LEVELS / (LEVELS - dropped)


def random_words(count: int, seed: int, device: torch.device) -> Tensor:
    """Return `count` random words of 64 bits.

    On a CPU they are SplitMix64's, whose words do not wait for each other, so that they are made by all lanes and
    threads; torch's own generator makes one after the other there. Source: Steele, Lea and Flood, OOPSLA 2014, fig. 16.
    """
    if device.type != "cpu":
        rng = torch.Generator(device=device).manual_seed(seed)
        return torch.empty(count, dtype=torch.int64, device=device).random_(-(2**63), None, generator=rng)
    z = torch.arange(1, count + 1, device=device).mul_(_GOLDEN).add_(seed)
    for shift, factor in ((30, _MIX[0]), (27, _MIX[1])):
        z.bitwise_xor_(_shifted(z, shift)).mul_(factor)
    return z.bitwise_xor_(_shifted(z, 31))


def _shifted(z: Tensor, by: int) -> Tensor:
    """Return the words shifted to the right, with zeros from the left: torch's own shift copies the sign."""
    return (z >> by).bitwise_and_(2 ** (64 - by) - 1)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float, seed: int) -> Tensor:
        ctx.rate, ctx.seed = rate, seed
        return dropped(x, rate, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return dropped(upstream, ctx.rate, ctx.seed), None, None
