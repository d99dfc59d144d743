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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorakit.core.checks import check_whole
from lorakit.core.method import Start, Tensors
from lorakit.core.peft_form import LORA_NO_BEARING, PATTERNS, PeftForm
from lorakit.core.site import Decl, Role, Site
from lorakit.core.state import Update
from lorakit.core.targets import LINEAR_KINDS
from lorakit.errors import SpecError
from lorakit.methods.lora import Scaled


@dataclass(frozen=True)
class BlockDiagonal(Scaled):
    """Add `s B A` with B (side up), A (side down) or both in `blocks` blocks on the diagonal."""

    blocks: int = 2
    side: Literal["up", "down", "both"] = "both"

    name: ClassVar[str] = "block-diagonal"
    paper: ClassVar[str] = "openreview 1cjLvtFOmL (BD-LoRA)"
    formula: ClassVar[str] = "dW = s B A, with B (side up), A (side down) or both block-diagonal"
    count: ClassVar[str] = "rank * (m if side == 'down' else m // blocks) + rank * (n if side == 'up' else n // blocks)"
    kinds: ClassVar[frozenset[str]] = frozenset(LINEAR_KINDS)
    peft: ClassVar[PeftForm | None] = PeftForm(
        "LORA",
        {"r": "rank", "lora_alpha": "alpha", "use_rslora": "stabilised"},
        {"down": "lora_A.weight", "up": "lora_B.weight"},
        read=lambda method, q, embedding: _from_peft(method, q),
        kinds=frozenset({"linear"}),
        patterns=PATTERNS,
        flag="use_bdlora",
        settings={"init_lora_weights": True, "bias": "none", "use_dora": False},
        no_bearing=LORA_NO_BEARING,
        dropout="lora_dropout",
        config=lambda updates: _config(updates),
        of_config=lambda config, path: _of_config(config, path),
        refusal=lambda site, method: "PEFT has one side in blocks, not both" if method.side == "both" else None,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("blocks", self.blocks, hint="; 1 is LoRA")
        if self.side not in ("up", "down", "both"):
            raise SpecError(f"side must be up, down or both, not {self.side!r}")
        if self.rank % self.blocks:
            above = math.ceil(self.rank / self.blocks) * self.blocks
            raise SpecError(f"rank {self.rank} does not divide into {self.blocks} blocks; use rank {above}")

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

    def pair(self, p: Tensors) -> tuple[Tensor, Tensor, float]:
        """Return `(A, B, s)`, the blocks laid out on the diagonal."""
        down, up, scale = super().pair(p)
        if self.side != "up":
            down = on_the_diagonal(down, self.blocks)
        if self.side != "down":
            up = on_the_diagonal(up, self.blocks)
        return down, up, scale


def on_the_diagonal(stacked: Float[Tensor, "rows width"], blocks: int) -> Float[Tensor, "rows full_width"]:
    """Return the `blocks` equal blocks stacked in `stacked` side by side on the diagonal of a matrix of zeros."""
    full: Tensor = torch.block_diag(*stacked.chunk(blocks))  # type: ignore[no-untyped-call]
    return full


def _config(updates: Sequence[Update]) -> dict[str, Any]:
    """Return BD-LoRA's lists; PEFT looks for their entries anywhere in a path, so they are whole paths.

    Raises:
        SpecError: a path inside another path of the other side, several numbers of blocks.
    """
    sides = {update.site.path: cast(BlockDiagonal, update.method) for update in updates}
    if len(counts := {method.blocks for method in sides.values()}) > 1:
        raise SpecError(f"PEFT has one number of blocks for all layers, not {sorted(counts)}")
    for path, method in sides.items():
        if other := [p for p, m in sides.items() if m.side != method.side and path in p]:
            raise SpecError(f"PEFT would read {other[0]} as side {method.side}, for {path} is a part of its name")
    lists = {f"target_modules_bd_{f}": [p for p, m in sides.items() if m.side == side]
             for f, side in (("a", "down"), ("b", "up"))}  # fmt: skip
    return {"use_bdlora": {**lists, "nblocks": counts.pop(), "match_strict": True}}


def _of_config(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    said = config["use_bdlora"]
    hit = {side: any(name in path for name in said.get(f"target_modules_bd_{f}") or ())
           for f, side in (("a", "down"), ("b", "up"))}  # fmt: skip
    if hit["up"] == hit["down"]:
        raise SpecError(f"use_bdlora names {'both sides' if hit['up'] else 'no side'} of {path} as block-diagonal")
    return {"blocks": said.get("nblocks", 1), "side": "up" if hit["up"] else "down"}


def _from_peft(method: BlockDiagonal, q: dict[str, Tensor]) -> Update:
    down, up, n = q["down"], q["up"], method.blocks
    rank = up.shape[-1] * (1 if method.side == "down" else n)
    if down.dim() != 2 or up.dim() != 2 or not down.shape[0] == rank == method.rank:
        raise SpecError(
            f"lora_A {tuple(down.shape)}, lora_B {tuple(up.shape)} are no pair of rank {method.rank} with {n} blocks "
            f"on side {method.side}"
        )
    return Update(Site("", up.shape[0], down.shape[1] * (n if method.side == "down" else 1)), method, dict(q))
