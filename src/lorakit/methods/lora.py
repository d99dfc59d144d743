"""LoRA and rsLoRA: a trained product of two thin matrices beside a frozen weight.

`dW = s B A` with `down (r, in)` = A and `up (out, r)` = B of arXiv 2106.09685, eq. 3, and `s = alpha / r`. The
rank-stabilised form of arXiv 2312.03732 changes one thing, `s = alpha / sqrt(r)`, so that high ranks keep learning.

Where the pair starts is a choice of its own (`inits/`). A start `B0 A0` that is not 0 is kept beside the pair and taken
off, `dW = s (B A - B0 A0)`: a LoRA of rank 2r on the untouched base. Written as `s (B - B0) A + s B0 (A - A0)` it is 0
to the bit at the start, and no small difference of two large products later.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lorakit.core.checks import check_flag, check_positive, check_whole
from lorakit.core.init import Init
from lorakit.core.method import LowRank, Start, Tensors, down_up
from lorakit.core.peft_form import LORA_NO_BEARING, PATTERNS, PeftForm, pair_from_peft, pair_to_peft
from lorakit.core.registry import init as init_named
from lorakit.core.site import Decl, Role, Site
from lorakit.errors import SpecError

_KAIMING = init_named("kaiming")()
_STARTS = {"down_start": "down", "up_start": "up"}


@dataclass(frozen=True)
class Scaled(LowRank):
    """What LoRA shares with its variants: a rank and `s = alpha / rank`, stabilised `s = alpha / sqrt(rank)`."""

    rank: int = 16
    alpha: float = 32.0
    stabilised: bool = False

    def __post_init__(self) -> None:
        check_whole("rank", self.rank, hint="; exclude a layer to skip it")
        check_positive("alpha", self.alpha, hint="; the usual choice is 2 * rank")
        check_flag("stabilised", self.stabilised)

    @property
    def scale(self) -> float:
        """Return s."""
        return self.alpha / (math.sqrt(self.rank) if self.stabilised else self.rank)

    def pair(self, p: Tensors) -> tuple[Tensor, Tensor, float]:
        """Return `(A, B, s)`."""
        return p["down"], p["up"], self.scale

    def factors(self, p: Tensors) -> tuple[Float[Tensor, "r in *kernel"], Float[Tensor, "out rg"]]:
        """Return `(A, s B)`."""
        down, up, scale = self.pair(p)
        return down, scale * up


@dataclass(frozen=True)
class LoRA(Scaled):
    """Add `s B A`: `s = alpha / rank`, or `alpha / sqrt(rank)` when stabilised (rsLoRA)."""

    init_: Init = _KAIMING
    """Where the pair starts; `init` in recipes and files, where no method of that name is in the way."""

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "arXiv 2106.09685 (LoRA), 2312.03732 (rsLoRA)"
    formula: ClassVar[str] = "dW = s B A, s = alpha / rank (stabilised: alpha / sqrt(rank))"
    count: ClassVar[str] = "rank * (m + n)"
    peft: ClassVar[PeftForm | None] = PeftForm(
        "LORA",
        {"r": "rank", "lora_alpha": "alpha", "use_rslora": "stabilised"},
        {"down": "lora_A.weight", "up": "lora_B.weight"},
        read=pair_from_peft,
        write=pair_to_peft,
        grouped=True,
        patterns=PATTERNS,
        settings={"init_lora_weights": True, "bias": "none", "use_dora": False},
        no_bearing=LORA_NO_BEARING,
        dropout="lora_dropout",
        forgets=frozenset({"dilation", "padding_mode"}),
        embedding={"down": "lora_embedding_A", "up": "lora_embedding_B"},
        plain=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.init_, Init):
            raise SpecError(f"init must be an initialisation such as Kaiming() or Pissa(), not {self.init_!r}")

    def at_rank(self, rank: int) -> LoRA:
        """Return this method at another rank and the same scale."""
        ratio = rank / self.rank
        return replace(self, rank=rank, alpha=self.alpha * (math.sqrt(ratio) if self.stabilised else ratio))

    def check(self, site: Site) -> None:
        """Raise `SpecError` for a rank the weight cannot have, or one that cannot start as `init` says."""
        super().check(site)
        self.init_.check(self.rank, site)

    def tensors(self, site: Site) -> dict[str, Decl]:
        """Declare r (in + out) parameters, and as many frozen values where the start is kept."""
        pair = down_up(self.rank, site)
        kept = {name: Decl(pair[own].shape, Role.BANK, trainable=False) for name, own in _STARTS.items()}
        return pair | kept if self.init_.keeps_start else pair

    def init(self, p: Tensors, start: Start) -> None:
        """Start as `init` says, and keep a copy of a start that will be taken off."""
        self.init_.fill(p["down"], p["up"], self.scale, start)
        if self.init_.keeps_start:
            for name, own in _STARTS.items():
                p[name].copy_(p[own])

    def pair(self, p: Tensors) -> tuple[Tensor, Tensor, float]:
        """Return `(A, B, s)`, or `([A; A - A0], [B - B0, B0], s)`, whose product is `s (B A - B0 A0)`."""
        if not self.init_.keeps_start:
            return super().pair(p)
        down, up = p["down"], p["up"]
        groups = down.shape[0] // up.shape[1]
        by_group = [t.reshape(groups, -1, *down.shape[1:]) for t in (down, down - p["down_start"])]
        stacked = torch.cat(by_group, dim=1).flatten(0, 1)  # each group's rows stay together
        return stacked, torch.cat([up - p["up_start"], p["up_start"]], dim=1), self.scale
