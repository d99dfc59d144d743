"""Adaptive LoRA: a few times during a run, rank moves to the layers whose updates are largest.

`dW = s B diag(gate) A` with `down (high, in)` = A, `up (out, high)` = B, and s = alpha / target_rank whatever the rank.
Resizing a pair is moving its gate: tensors keep their shapes under the optimizer, and `trimmed` makes a plain LoRA of
what acts. No single paper; the share of energy in the first k singular values, sometimes proposed as the score, is 1
for every adapter of rank k and lowest for flat spectra, so it gives rank to the layers that need least. Here a layer's
score is the size of its update, the parameter budget is met after the limits, s never jumps, nothing restarts, and
Adam's moments are reset where a pair was turned into singular coordinates, for they mean nothing there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorakit.core.checks import check_positive, check_whole
from lorakit.core.method import LowRank, Method, Schedule, Start, Tensors, down_up
from lorakit.core.site import Decl, Role, Site
from lorakit.errors import SpecError, did_you_mean
from lorakit.methods.lora import LoRA
from lorakit.methods.reallocation import SCORES, Reallocation


@dataclass(frozen=True)
class Adaptive(LowRank):
    """LoRA of `low` to `high` directions a site, at the parameters of LoRA(target_rank), moved `rounds` times.

    Rank is allocated after steps `i / (rounds + 1)` of the run, so the last part of it trains at the final ranks.
    """

    target_rank: int = 8
    low: int = 1
    high: int = 16
    alpha: float = 16.0
    score: str = "norm"
    rounds: int = 4

    name: ClassVar[str] = "adaptive"
    paper: ClassVar[str] = "arXiv 2106.09685 (LoRA), with ranks by a budget"
    formula: ClassVar[str] = "dW = s B diag(gate) A, s = alpha / target_rank"
    count: ClassVar[str] = "high * (m + n)"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "transposed-linear"})

    def __post_init__(self) -> None:
        for name in ("target_rank", "low", "high", "rounds"):
            check_whole(name, getattr(self, name))
        if not self.low <= self.target_rank <= self.high:
            raise SpecError(
                f"target_rank {self.target_rank} must lie in {self.low} to {self.high} (low to high), for it is the "
                "mean rank; change it, or move the limits"
            )
        check_positive("alpha", self.alpha, hint="; the usual choice is 2 * target_rank")
        if self.score not in SCORES:
            raise SpecError(
                f"unknown score {self.score!r}{did_you_mean(self.score, SCORES)}; known: {', '.join(SCORES)}"
            )
        object.__setattr__(self, "rank", self.high)  # what LowRank checks and others report

    @property
    def scale(self) -> float:
        """Return s."""
        return self.alpha / self.target_rank

    def tensors(self, site: Site) -> dict[str, Decl]:
        """Declare `high` directions, and which of them act."""
        return {**down_up(self.high, site), "gate": Decl((self.high,), Role.GATE, trainable=False)}

    def init(self, p: Tensors, start: Start) -> None:
        """Start as LoRA(target_rank) does, at dW = 0."""
        nn.init.kaiming_uniform_(p["down"], a=math.sqrt(5), generator=start.rng)
        nn.init.zeros_(p["up"])
        p["gate"].copy_(torch.arange(self.high) < self.target_rank)

    def factors(self, p: Tensors) -> tuple[Float[Tensor, "r in *kernel"], Float[Tensor, "out rg"]]:
        """Return `(A, s B diag(gate))`."""
        return p["down"], self.scale * p["up"] * p["gate"]

    def schedule(self, adapters: Mapping[str, tuple[Site, Tensors]], steps: int) -> Schedule:
        """Return the reallocations of a run of `steps`."""
        if steps <= self.rounds:
            raise SpecError(f"{steps} steps have no room for {self.rounds} rounds; lower rounds, or train longer")
        rounds = [math.ceil(steps * i / (self.rounds + 1)) for i in range(1, self.rounds + 1)]
        return Reallocation(adapters, rounds, SCORES[self.score], self.target_rank, self.low, self.high)

    def trimmed(self, site: Site, p: Tensors) -> tuple[Method, Tensors]:
        """Return a plain LoRA of the directions that act."""
        acting = p["gate"] != 0
        rank = int(acting.sum())
        return LoRA(rank, self.scale * rank), {"down": p["down"][acting], "up": p["up"][:, acting]}
