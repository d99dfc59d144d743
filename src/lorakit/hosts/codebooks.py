"""The values a code can stand for: NF4, FP4, and the 8-bit dynamic map that keeps the block maxima of both.

Each is rebuilt here from its definition, and is bit for bit the table that bitsandbytes carries, so that packed weights
mean the same on both sides.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

OFFSET = 0.9677083
"""Where NF4's quantiles begin: 1 - (1/32 + 1/30) / 2, to the digits of the published table."""

_KEPT: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""What a table is made with, whatever the defaults are while a model is being loaded: it is made once."""


@cache
def nf4() -> Float[Tensor, 16]:
    """Return the 16 values of NF4, ascending from -1 to 1 with an exact 0 (arXiv 2305.14314, section 3).

    8 quantiles of N(0, 1) above 0 and 7 below, evenly spaced in probability and divided by the largest:
    `Phi^-1(linspace(OFFSET, 1/2, 9)[:-1])` and `-Phi^-1(linspace(OFFSET, 1/2, 8)[:-1])`.
    """
    quantile = NormalDist().inv_cdf
    above, below = (torch.linspace(OFFSET, 0.5, n, **_KEPT)[:-1].tolist() for n in (9, 8))
    values = torch.tensor(sorted([*map(quantile, above), 0.0, *(-quantile(p) for p in below)]), **_KEPT)
    return values / values.max()


@cache
def fp4() -> Float[Tensor, 16]:
    """Return the 16 values of FP4 by their bits: sign, two of exponent with bias 2, one of mantissa; divided by 12.

    0 00 1 is the one subnormal, which bitsandbytes reads as 0.0625 and not as the half of the next value.
    """
    values = [0, 0.0625, 8, 12, 4, 6, 2, 3]
    return torch.tensor([*values, *(0 - v for v in values)], **_KEPT) / 12


@cache
def dynamic_map() -> Float[Tensor, 256]:
    """Return the signed 8-bit dynamic map, ascending from -0.99297 to 1 (arXiv 1511.04561).

    With the exponent e from -6 to 0, the range 0.1 to 1 is cut into 2^(e+6) parts and their centres are taken, times
    10^e, of either sign; and 0, and 1.
    """
    values = [0.0, 1.0]
    for parts in range(7):
        edges = torch.linspace(0.1, 1, 2**parts + 1, **_KEPT)
        centres = ((edges[:-1] + edges[1:]) / 2.0) * 10 ** (parts - 6)
        values += [*centres.tolist(), *(-centres).tolist()]
    return torch.tensor(sorted(values), **_KEPT)


BOOKS = {"nf4": nf4, "fp4": fp4}
"""The 4-bit code books by name."""


@cache
def pairs(kind: str, device: torch.device) -> Tensor:
    """Return, for each byte, the two fp32 values it stands for, as one int64: a gather then moves both at once."""
    book, byte = BOOKS[kind](), torch.arange(256, device="cpu")
    both = torch.stack([book[byte >> 4], book[byte & 15]], 1)
    return both.view(torch.int64).reshape(256).to(device)
