"""VeRA: all layers share one pair of frozen random banks, and each trains two vectors that scale it.

`dW = diag(b) B diag(d) A` (arXiv 2310.11454, eq. 2), `B (out, r)` and `A (r, in)` drawn once from a seed, `d (r,)` and
`b (out,)` trained. A narrower layer uses the first columns of A, a lower one the first rows of B, so layers of one
width hold one tensor, and the widest layer's is the whole bank. There is no alpha; VeRA learns at about ten times
LoRA's rate. Banks and start are those of PEFT: uniform within sqrt(6 / fan_in), A drawn first, d = 0.1, b = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorakit.core.checks import check_whole, is_number
from lorakit.core.method import LowRank, Method, Start, Tensors
from lorakit.core.peft_form import PeftForm
from lorakit.core.site import Decl, Role, Site
from lorakit.core.state import Update
from lorakit.core.targets import LINEAR_KINDS
from lorakit.errors import SpecError


@dataclass(frozen=True)
class VeRA(LowRank):
    """Add `diag(b) B diag(d) A` with A and B shared and frozen; `key` seeds them.

    `widest` and `tallest` are the bank's own sizes; they follow from the targets.
    """

    rank: int = 256
    d_initial: float = 0.1
    key: int = 0
    widest: int = 0
    tallest: int = 0

    name: ClassVar[str] = "vera"
    paper: ClassVar[str] = "arXiv 2310.11454 (VeRA)"
    formula: ClassVar[str] = "dW = diag(b) B diag(d) A, with A and B random, frozen and shared"
    count: ClassVar[str] = "m + rank"
    kinds: ClassVar[frozenset[str]] = frozenset(LINEAR_KINDS)
    peft: ClassVar[PeftForm | None] = PeftForm(
        "VERA",
        {"r": "rank", "d_initial": "d_initial", "projection_prng_key": "key"},
        {"d": "vera_lambda_d", "b": "vera_lambda_b"},
        read=lambda method, q, embedding: _from_peft(method, q),
        kinds=frozenset(LINEAR_KINDS),
        settings={"bias": "none", "save_projection": True, "init_weights": True},
        dropout="vera_dropout",
        banks={"down": "vera_A", "up": "vera_B"},
        plain=True,
    )

    def __post_init__(self) -> None:
        check_whole("rank", self.rank, hint="; VeRA takes 256 to 1024")
        if not (is_number(self.d_initial) and self.d_initial != 0):
            raise SpecError(f"d_initial must be a number other than 0, not {self.d_initial!r}; at 0 b learns nothing")
        check_whole("key", self.key, 0, hint="; it seeds the banks")
        for name in ("widest", "tallest"):
            check_whole(name, getattr(self, name), 0, hint="; the layers tell it, so leave it out")

    def settled(self, sites: Sequence[Site]) -> Method:
        """Return this method with banks as wide as the widest of `sites` and as tall as the tallest."""
        return replace(self, widest=max(site.in_ for site in sites), tallest=max(site.out for site in sites))

    def check(self, site: Site) -> None:
        """Raise `SpecError` for a layer that is not linear; a bank may have more rows than the weight has ranks."""
        Method.check(self, site)

    def tensors(self, site: Site) -> dict[str, Decl]:
        """Declare r + out parameters and its part of the banks, held with the layers of its width or height."""
        width, height = self._bank(site)
        bank = f"vera.{self.rank}.{width}.{height}.{self.key}"
        return {
            "down": Decl((self.rank, site.in_), Role.BANK, trainable=False, shared=f"{bank}.down.{site.in_}"),
            "up": Decl((site.out, self.rank), Role.BANK, trainable=False, shared=f"{bank}.up.{site.out}"),
            "d": Decl((self.rank,), Role.GATE),
            "b": Decl((site.out,), Role.GAIN),
        }

    def init(self, p: Tensors, start: Start) -> None:
        """Start at dW = 0: d = 0.1, b = 0, and whichever of A and B this layer is the first to hold."""
        p["d"].fill_(self.d_initial)
        p["b"].zero_()
        if "down" in p or "up" in p:
            width, height = self._bank(start.site)
            rng = torch.Generator().manual_seed(self.key)
            # in fp32 whatever the base is in: another dtype draws other numbers, and files must agree
            down = nn.init.kaiming_uniform_(torch.empty(self.rank, width, dtype=torch.float32), generator=rng)
            up = nn.init.kaiming_uniform_(torch.empty(height, self.rank, dtype=torch.float32), generator=rng)
            if "down" in p:
                p["down"].copy_(down[:, : start.site.in_])
            if "up" in p:
                p["up"].copy_(up[: start.site.out])

    def factors(self, p: Tensors) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
        """Return `(diag(d) A, diag(b) B)`."""
        return p["d"][:, None] * p["down"], p["b"][:, None] * p["up"]

    def _bank(self, site: Site) -> tuple[int, int]:
        """Return the bank's width and height; before `settled`, this layer is all it knows of."""
        return max(self.widest, site.in_), max(self.tallest, site.out)


def _from_peft(method: VeRA, q: dict[str, Tensor]) -> Update:
    """Return the update with the banks whole: which part of A the layer uses, its width tells, and no tensor of it."""
    (out,), banks = q["b"].shape, (q["down"].shape, q["up"].shape)
    if q["d"].shape != (method.rank,) or banks[0][0] != method.rank or banks[1][1] != method.rank or out > banks[1][0]:
        raise SpecError(
            f"vera_lambda_d {tuple(q['d'].shape)}, vera_lambda_b {(out,)}, vera_A {tuple(banks[0])} and vera_B "
            f"{tuple(banks[1])} do not fit each other at r = {method.rank}"
        )
    return Update(Site("", out, 0), replace(method, widest=banks[0][1], tallest=banks[1][0]), q)
