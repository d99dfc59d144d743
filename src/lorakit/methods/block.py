"""Block-diagonal LoRA: one factor, or both, in N blocks on the diagonal, so that N devices need not talk to each other.

`dW = s B A` with `s = alpha / r`; the side says which factor has the blocks:

    up    B_i (out/N, r/N)  layers an engine splits by their outputs: query, key, value, up, gate
    down  A_i (r/N, in/N)   layers it splits by their inputs: attention output, down
    both                    N independent LoRAs, each from one slice of the inputs to one slice of the outputs

One side is BD-LoRA (NeurIPS 2025, openreview 1cjLvtFOmL), stored as PEFT stores it; the sides are those of the paper,
which the help of PEFT's two fields swaps. Its authors' code draws the A of side `down` within sqrt(6 N) times LoRA's
bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorakit.core.method import LowRank, Start, Tensors
from lorakit.core.site import Decl, Role, Site
from lorakit.core.targets import LINEAR_KINDS
from lorakit.errors import SpecError
from lorakit.methods.lora import LoRA


@dataclass(frozen=True)
class BlockDiagonal(LowRank):
    """Add `s B A` with B (side up), A (side down) or both in `blocks` blocks on the diagonal."""

    rank: int = 16
    alpha: float = 32.0
    blocks: int = 2
    side: Literal["up", "down", "both"] = "both"
    stabilised: bool = False

    name: ClassVar[str] = "block-diagonal"
    paper: ClassVar[str] = "openreview 1cjLvtFOmL (BD-LoRA)"
    formula: ClassVar[str] = "dW = s B A, with B (side up), A (side down) or both block-diagonal"
    count: ClassVar[str] = "rank * (m if side == 'down' else m // blocks) + rank * (n if side == 'up' else n // blocks)"
    kinds: ClassVar[frozenset[str]] = frozenset(LINEAR_KINDS)

    def __post_init__(self) -> None:
        LoRA(self.rank, self.alpha, self.stabilised)  # refuses what LoRA refuses
        if isinstance(self.blocks, bool) or not isinstance(self.blocks, int) or self.blocks < 1:
            raise SpecError(f"blocks must be a whole number of at least 1, not {self.blocks!r}; 1 is LoRA")
        if self.side not in ("up", "down", "both"):
            raise SpecError(f"side must be up, down or both, not {self.side!r}")
        if self.rank % self.blocks:
            above = math.ceil(self.rank / self.blocks) * self.blocks
            raise SpecError(f"rank {self.rank} does not divide into {self.blocks} blocks; use rank {above}")

    @property
    def scale(self) -> float:
        """Return s."""
        return self.alpha / (math.sqrt(self.rank) if self.stabilised else self.rank)

    def check(self, site: Site) -> None:
        """Raise `SpecError` for a layer the blocks do not divide, with the numbers of blocks that would."""
        super().check(site)
        split = {"outputs": site.out} if self.side == "up" else {"inputs": site.in_}
        split |= {"outputs": site.out} if self.side == "both" else {}
        for what, size in split.items():
            if size % self.blocks:
                fit = [n for n in range(1, self.rank + 1) if all(s % n == 0 for s in (self.rank, *split.values()))]
                raise SpecError(
                    f"its {size} {what} do not divide into {self.blocks} blocks; "
                    f"use blocks {' or '.join(map(str, fit))} at rank {self.rank}, or exclude this path"
                )

    def tensors(self, site: Site) -> dict[str, Decl]:
        """Declare both factors, of one in blocks the blocks alone: `down (r, in/N)`, `up (out, r/N)`."""
        in_ = site.in_ if self.side == "up" else site.in_ // self.blocks
        per_row = self.rank if self.side == "down" else self.rank // self.blocks
        return {"down": Decl((self.rank, in_), Role.DOWN), "up": Decl((site.out, per_row), Role.UP)}

    def init(self, p: Tensors, start: Start) -> None:
        """Start at dW = 0: A ~ U(-1/sqrt(k), 1/sqrt(k)) for the k inputs of a row (down: sqrt(6) wider), B = 0."""
        slope = 0.0 if self.side == "down" else math.sqrt(5)
        nn.init.kaiming_uniform_(p["down"], a=slope, generator=start.rng)
        nn.init.zeros_(p["up"])

    def factors(self, p: Tensors) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
        """Return `(A, s B)`, the blocks laid out on the diagonal."""
        down, up = p["down"], self.scale * p["up"]
        if self.side != "up":
            down = on_the_diagonal(down, self.blocks)
        if self.side != "down":
            up = on_the_diagonal(up, self.blocks)
        return down, up


def on_the_diagonal(stacked: Float[Tensor, "rows width"], blocks: int) -> Float[Tensor, "rows full_width"]:
    """Return the `blocks` equal blocks stacked in `stacked` side by side on the diagonal of a matrix of zeros."""
    full: Tensor = torch.block_diag(*stacked.chunk(blocks))  # type: ignore[no-untyped-call]
    return full
