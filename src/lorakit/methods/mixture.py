"""Mixture of LoRA experts: a router reads each token and weighs the experts' updates for it.

`y = W0 x + s sum_e g_e(x) B_e A_e x` with `g = softmax(W_g x)`: all experts (LoRAMoE, arXiv 2312.09979), or each
token's `top` likeliest, renormalised (MixLoRA, 2404.15159, which gives a whole feed-forward block one router; here
every layer has its own). The update depends on x, so no single dW equals it and it cannot be merged.

The weights belong to the token: `g (..., E)` stands beside `x (..., in)` on every axis but the last. A loop over
`zip(experts, g)` walks along the batch instead, unnoticed where a batch has as many rows as there are experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lorakit.core.checks import check_positive, check_whole, is_number
from lorakit.core.method import Call, Method, Start, Tensors
from lorakit.core.site import Decl, Role, Site
from lorakit.core.targets import LINEAR_KINDS
from lorakit.errors import AliveError, SpecError


@dataclass(frozen=True)
class Mixture(Method):
    """Add `s sum_e g_e(x) B_e A_e x` over `experts` LoRAs of one rank, `top` of them a token (None: all).

    `balance` weighs the term `penalty` adds to the loss. Linear layers only: the outputs of a convolution do not stand
    where its inputs do, so no input is theirs to route by, and the inputs of an embedding have no features.
    """

    experts: int = 8
    rank: int = 4
    alpha: float = 32.0
    top: int | None = None
    balance: float = 0.0

    name: ClassVar[str] = "mixture"
    paper: ClassVar[str] = "arXiv 2312.09979 (LoRAMoE), 2404.15159 (MixLoRA)"
    formula: ClassVar[str] = "y += s sum_e g_e(x) B_e A_e x, g = softmax(W_g x) or its top, s = alpha / rank"
    count: ClassVar[str] = "experts * (rank * (m + n) + n)"
    kinds: ClassVar[frozenset[str]] = frozenset(LINEAR_KINDS)

    def __post_init__(self) -> None:
        check_whole("experts", self.experts, 2, hint="; with one the router has no choice, which is lora")
        check_whole("rank", self.rank)
        check_positive("alpha", self.alpha, hint="; the usual choice is 2 * rank")
        if self.top is not None and (type(self.top) is not int or not 2 <= self.top <= self.experts):
            raise SpecError(
                f"top must be 2 to {self.experts}, the number of experts, or left out, not {self.top!r}; "
                "a single choice has weight 1 whatever the router says, so the loss could not teach it"
            )
        if not (is_number(self.balance) and self.balance >= 0):
            raise SpecError(f"balance must be a number of at least 0, not {self.balance!r}; MixLoRA's is 0.01")

    def check(self, site: Site) -> None:
        """Raise `SpecError` for a layer that is not linear, or a rank it cannot have."""
        super().check(site)
        if self.rank > (most := site.max_rank):
            raise SpecError(f"rank {self.rank} exceeds min(out, in) = {most}; lower the rank or exclude this path")

    def tensors(self, site: Site) -> dict[str, Decl]:
        """Declare the experts' A and B, stacked along the rank, and the router W_g."""
        return {
            "down": Decl((self.experts * self.rank, site.in_), Role.DOWN),
            "up": Decl((site.out, self.experts * self.rank), Role.UP),
            "router": Decl((self.experts, site.in_), Role.GATE),
        }

    def init(self, p: Tensors, start: Start) -> None:
        """Start every expert at 0 as LoRA does: A and W_g ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0."""
        for name in ("down", "router"):
            nn.init.kaiming_uniform_(p[name], a=math.sqrt(5), generator=start.rng)
        nn.init.zeros_(p["up"])

    def branch(self, p: Tensors, call: Call) -> Tensor:
        """Return `s B (g * A x)`: a token's r hidden values of each expert, times that expert's weight."""
        likely = likelihood(call.whole, call.kept["router"])
        gates, share = self.route(likely)
        tokens = max(likely[..., 0].numel(), 1)  # a base that routes too may give a layer none
        kept = likely if self.balance else likely.detach()  # no graph for a penalty that is not asked for
        call.notes["likelihood"] = kept.reshape(-1, self.experts).sum(0) / tokens
        call.notes["share"] = share.reshape(-1, self.experts).sum(0) / tokens
        call.notes["entropy"] = torch.special.entr(likely.detach()).sum() / tokens
        hidden = call.apply(p["down"])
        gated = hidden.reshape(*gates.shape, self.rank) * gates.to(hidden.dtype).unsqueeze(-1)
        return call.mix(gated.flatten(-2), self.alpha / self.rank * p["up"])

    def route(self, likely: Float[Tensor, "*tokens e"]) -> tuple[Tensor, Tensor]:
        """Return g `(*tokens, e)`, and each expert's share of a token's choice: g too, or 1 / top for those chosen."""
        if self.top is None:
            return likely, likely.detach()
        highest, which = likely.topk(self.top, dim=-1)
        none = torch.zeros_like(likely)
        return none.scatter(-1, which, highest / highest.sum(-1, keepdim=True)), none.scatter(-1, which, 1 / self.top)

    def penalty(self, p: Tensors, notes: Tensors) -> Tensor:
        """Return `balance` times how unevenly the last forward used the experts; padding counts as tokens do.

        With `top`, Switch's `E sum_e f_e P_e` (arXiv 2101.03961, eq. 4), f the shares and P the mean likelihood: 1 when
        even. Without, where f is P, the squared coefficient of variation `var(P) / mean(P)^2`, `mean(P) = 1 / E`
        (LoRAMoE's, without its task types): 0 when even.

        Raises:
            AliveError: the last forward kept no gradient for the router, so the penalty would not act.
        """
        if not self.balance or "likelihood" not in notes:
            return p["router"].new_zeros(())
        likely = notes["likelihood"]
        if torch.is_grad_enabled() and p["router"].requires_grad and not likely.requires_grad:
            raise AliveError(
                "the last forward kept no gradient for the mixture's router, so balance would not act on it; "
                "with gradient checkpointing use use_reentrant=False"
            )
        even = self.experts * (notes["share"] * likely).sum() if self.top else self.experts**2 * likely.var()
        return self.balance * even


def likelihood(x: Float[Tensor, "*tokens in"], router: Float[Tensor, "e in"]) -> Float[Tensor, "*tokens e"]:
    """Return `softmax(W_g x)` over the experts, in fp32 or better, also under autocast: in 16 bits near experts tie."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(wide), router.to(wide)).softmax(-1)
