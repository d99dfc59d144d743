"""LoHa: the entrywise product of two low-rank products, of rank up to r^2 for the parameters of rank 2r.

`dW = s (B1 A1) * (B2 A2)`, `s = alpha / r` (FedPara, arXiv 2108.06098, prop. 1, without its nonlinearity; LyCORIS,
arXiv 2309.14859). The product is itself a low-rank one, `B1_k B2_l` over `A1_k A2_l` for every pair (k, l): so the
branch is that of a LoRA of rank r^2, which costs less than dW while r^2 (m + n) < m n. A convolution's kernel is
flattened with its inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from lorakit.core.checks import check_positive, check_whole
from lorakit.core.method import LowRank, Start, Tensors, down_up
from lorakit.core.peft_form import LYCORIS, LYCORIS_PATTERNS, PeftForm, matrices, without_core
from lorakit.core.site import Decl, Site
from lorakit.core.state import Update
from lorakit.errors import SpecError

_CORES = {"core1": "hada_t1", "core2": "hada_t2"}
"""What PEFT's `use_effective_conv2d` trains beside the pairs; it is multiplied out when it is read."""


@dataclass(frozen=True)
class LoHa(LowRank):
    """Add `s (B1 A1) * (B2 A2)`, two pairs of rank r multiplied entry by entry."""

    rank: int = 8
    alpha: float = 8.0

    name: ClassVar[str] = "loha"
    paper: ClassVar[str] = "arXiv 2108.06098 (FedPara), 2309.14859 (LyCORIS)"
    formula: ClassVar[str] = "dW = s (B1 A1) * (B2 A2), s = alpha / rank"
    count: ClassVar[str] = "2 * rank * (m + n)"
    peft: ClassVar[PeftForm | None] = PeftForm(
        "LOHA",
        {"r": "rank", "alpha": "alpha"},
        {"up1": "hada_w1_a", "down1": "hada_w1_b", "up2": "hada_w2_a", "down2": "hada_w2_b"} | _CORES,
        read=lambda method, q, embedding: _from_peft(method, q),
        write=lambda update: {name: t.flatten(1) for name, t in update.tensors.items()},
        kinds=frozenset({"linear", "conv1d", "conv2d"}),
        patterns=LYCORIS_PATTERNS,
        settings={"init_weights": True},
        no_bearing=LYCORIS,
        optional=frozenset(_CORES),
        folds=True,
        plain=True,
    )

    def __post_init__(self) -> None:
        check_whole("rank", self.rank, hint="; exclude a layer to skip it")
        check_positive("alpha", self.alpha, hint="; the usual choice is the rank")

    @property
    def scale(self) -> float:
        """Return s."""
        return self.alpha / self.rank

    def tensors(self, site: Site) -> dict[str, Decl]:
        """Declare two pairs; each group of a convolution has blocks of its own."""
        return {f"{name}{i}": decl for i in (1, 2) for name, decl in down_up(self.rank, site).items()}

    def init(self, p: Tensors, start: Start) -> None:
        """Start at dW = 0: A1 ~ U(-1/sqrt(n), 1/sqrt(n)), both B ~ U(-1/sqrt(r), 1/sqrt(r)), A2 = 0.

        An embedding reads one column of A1, so n counts as 1 there.
        """
        n = 1 if start.site.kind == "embedding" else start.site.fan_in
        for name, fan_in in (("down1", n), ("up1", p["up1"].shape[1]), ("up2", p["up2"].shape[1])):
            nn.init.uniform_(p[name], -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=start.rng)
        nn.init.zeros_(p["down2"])

    def factors(self, p: Tensors) -> tuple[Float[Tensor, "r in *kernel"], Float[Tensor, "out rg"]]:
        """Return the pair of rank r^2: `down[kl] = A1[k] A2[l]`, `up[:, kl] = s B1[:, k] B2[:, l]`, group by group."""
        up = (p["up1"].unsqueeze(2) * p["up2"].unsqueeze(1)).flatten(1)
        rank, shape = p["up1"].shape[1], p["down1"].shape[1:]
        down1, down2 = (p[name].reshape(-1, rank, *shape) for name in ("down1", "down2"))
        return (down1.unsqueeze(2) * down2.unsqueeze(1)).flatten(0, 2), self.scale * up


def _from_peft(method: LoHa, q: dict[str, Tensor]) -> Update:
    q = dict(q)
    for i in (1, 2):
        if (core := q.pop(f"core{i}", None)) is not None:
            q[f"up{i}"], q[f"down{i}"] = without_core(core, q[f"up{i}"], q[f"down{i}"])
    matrices("hada_w1 and hada_w2", (q["up1"], q["down1"]), (q["up2"], q["down2"]))
    if (rank := q["up1"].shape[1]) != method.rank:
        raise SpecError(f"hada_w1_a has rank {rank}, the configuration says {method.rank} (r, or rank_pattern)")
    return Update(Site("", q["up1"].shape[0], q["down1"].shape[1]), method, dict(q))
