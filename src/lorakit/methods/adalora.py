"""AdaLoRA: as many triplets at each weight as they are worth, under one budget over all of them.

`dW = s P Lambda Q` with `up (out, r)` = P, `gain (r,)` = the diagonal of Lambda and `down (r, in)` = Q of arXiv
2303.10512, eq. 3; `s = alpha / (init_rank + 1e-5)` stays what it was when triplets are pruned, as in the authors' code.
A pruned triplet has gain 0. `pruning.py` decides which; steps are numbered from 1, so that a run without final steps
ends on its target too (numbered from 0, as examples of PEFT do, the last choice is never made).

Differing from PEFT 0.21: `target_rank == init_rank` is refused in words (there: kthvalue fails), a weight without a
gradient keeps its importance (there: a crash), of triplets with equal scores exactly the budget survives (there: none
of them), and s is a constant (there: on a 16-bit base its denominator is trained, and not saved).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorakit.core.checks import check_positive, check_whole, is_number
from lorakit.core.method import LowRank, Schedule, Start, Tensors, down_up, per_group
from lorakit.core.peft_form import LORA_NO_BEARING, PeftForm, matrices
from lorakit.core.site import Decl, Role, Site
from lorakit.core.state import Update
from lorakit.errors import SpecError
from lorakit.methods.pruning import Budget, Pruning


@dataclass(frozen=True)
class AdaLoRA(LowRank):
    """Add `s P Lambda Q`, from `init_rank` triplets a site down to `target_rank` on average over the sites.

    `tinit` steps prune nothing, `tfinal` steps at the end keep the choice, every `delta_t`-th step between prunes.
    `orthogonal_weight` weighs the penalty. `kept` is the number of triplets that `trimmed` left, None before.
    """

    target_rank: int = 8
    init_rank: int = 12
    alpha: float = 24.0
    tinit: int = 0
    tfinal: int = 0
    delta_t: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonal_weight: float = 0.5
    kept: int | None = field(default=None, metadata={"written": True})

    name: ClassVar[str] = "adalora"
    paper: ClassVar[str] = "arXiv 2303.10512"
    formula: ClassVar[str] = "dW = s P diag(lambda) Q, s = alpha / (init_rank + 1e-5)"
    count: ClassVar[str] = "(kept or init_rank) * (m + n + 1)"
    peft: ClassVar[PeftForm | None] = PeftForm(
        "ADALORA",
        {
            "target_r": "target_rank",
            "init_r": "init_rank",
            "lora_alpha": "alpha",
            "tinit": "tinit",
            "tfinal": "tfinal",
            "deltaT": "delta_t",
            "beta1": "beta1",
            "beta2": "beta2",
            "orth_reg_weight": "orthogonal_weight",
        },
        {"down": "lora_A", "up": "lora_B", "gain": "lora_E"},
        read=lambda method, q, embedding: _from_peft(method, q),
        write=lambda update: {name: t.flatten(1) if t.dim() > 1 else t[:, None] for name, t in update.tensors.items()},
        kinds=frozenset({"linear", "transposed-linear", "conv2d"}),
        settings={"init_lora_weights": True, "bias": "none", "use_dora": False, "use_rslora": False},
        no_bearing=LORA_NO_BEARING | {"r", "rank_pattern", "alpha_pattern", "total_step"},
        dropout="lora_dropout",
        folds=True,
        plain=True,
        config=lambda updates: _config(updates),
    )

    def __post_init__(self) -> None:
        least = {"target_rank": 1, "init_rank": 1, "tinit": 0, "tfinal": 0, "delta_t": 1}
        for name, low in least.items() if self.kept is None else [*least.items(), ("kept", 1)]:
            check_whole(name, getattr(self, name), low)
        if self.target_rank >= self.init_rank:
            raise SpecError(
                f"target_rank {self.target_rank} must be below init_rank {self.init_rank}: ranks are pruned from one "
                "to the other; raise init_rank (1.5 * target_rank is usual), or use method lora for a fixed rank"
            )
        if self.kept is not None and self.kept > self.init_rank:
            raise SpecError(
                f"kept {self.kept} is more than init_rank {self.init_rank}; a run writes it, so leave it out"
            )
        check_positive("alpha", self.alpha, hint="; the usual choice is 2 * init_rank")
        for name in ("beta1", "beta2"):
            if not (is_number(beta := getattr(self, name)) and 0 < beta < 1):
                raise SpecError(f"{name} must lie between 0 and 1, not {beta!r}; the paper's is 0.85")
        weight = self.orthogonal_weight
        if not (is_number(weight) and weight >= 0):
            raise SpecError(f"orthogonal_weight must be at least 0, not {weight!r}; usual are 0.1 to 0.5")
        object.__setattr__(self, "rank", self.kept or self.init_rank)  # what LowRank checks and others report

    @property
    def scale(self) -> float:
        """Return s."""
        return self.alpha / (self.init_rank + 1e-5)

    def tensors(self, site: Site) -> dict[str, Decl]:
        """Declare r (in + out + 1) parameters."""
        return {**down_up(self.rank, site), "gain": Decl((self.rank,), Role.GAIN)}

    def init(self, p: Tensors, start: Start) -> None:
        """Start at dW = 0: P, Q ~ N(0, 0.02^2), lambda = 0."""
        nn.init.normal_(p["down"], std=0.02, generator=start.rng)
        nn.init.normal_(p["up"], std=0.02, generator=start.rng)
        nn.init.zeros_(p["gain"])

    def factors(self, p: Tensors) -> tuple[Float[Tensor, "r in *kernel"], Float[Tensor, "out rg"]]:
        """Return `(Lambda Q, s P)`."""
        gain = p["gain"].view(-1, *[1] * (p["down"].dim() - 1))
        return gain * p["down"], self.scale * p["up"]

    def penalty(self, p: Tensors, notes: Tensors) -> Tensor:
        """Return `w (|P^T P - I|_F + |Q Q^T - I|_F) / 2`, which keeps P and Q near orthogonal.

        The norm is not squared and, with the mean over sites, is a mean over all 2n matrices: so do the authors' code
        (w = 0.1) and PEFT (w = 0.5); the paper's eq. 4 has the sum of squares. Grouped convolutions: per group's block.
        """
        down, up = per_group(p["down"], p["up"])
        eye = torch.eye(up.shape[2], dtype=up.dtype, device=up.device)
        off = torch.stack([torch.linalg.vector_norm(gram - eye) for gram in (up.mT @ up, down @ down.mT)])
        return self.orthogonal_weight * off.mean()

    def schedule(self, adapters: Mapping[str, tuple[Site, Tensors]], steps: int) -> Schedule:
        """Return the pruning of a run of `steps` to `target_rank` triplets a site on average."""
        end = steps - self.tfinal
        if self.tinit >= end:
            raise SpecError(
                f"a run of {steps} steps leaves none to prune in between tinit {self.tinit} and tfinal {self.tfinal}; "
                "shorten them, or train longer"
            )
        first = sum(len(p["gain"]) for _, p in adapters.values())
        budget = Budget(first, min(first, self.target_rank * len(adapters)), self.tinit, end, self.delta_t)
        return Pruning(adapters, budget, self.beta1, self.beta2)

    def trimmed(self, site: Site, p: Tensors) -> tuple[AdaLoRA, Tensors] | None:
        """Return the update without its pruned triplets; a grouped convolution keeps as many in every group."""
        acting = (p["gain"] != 0).reshape(site.groups, -1)
        most = int(acting.sum(1).max())
        if most == 0:
            return None
        chosen = acting.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        offset = torch.arange(site.groups, device=chosen.device)[:, None] * acting.shape[1]
        rows = (chosen + offset).flatten()
        up = p["up"].reshape(site.groups, -1, acting.shape[1]).take_along_dim(chosen[:, None], 2).flatten(0, 1)
        return replace(self, kept=len(rows)), {"down": p["down"][rows], "up": up, "gain": p["gain"][rows]}


def _config(updates: Sequence[Update]) -> dict[str, Any]:
    """Return which of its first triplets each trimmed weight has kept, and a run long enough for PEFT to take it."""
    pattern = {}
    for update in updates:
        method = cast(AdaLoRA, update.method)
        if method.kept is not None:
            pattern[f"{update.site.path}.lora_E"] = [i < method.kept for i in range(method.init_rank)]
    first = cast(AdaLoRA, updates[0].method)
    return {"rank_pattern": pattern or None, "total_step": first.tinit + first.tfinal + 1}


def _from_peft(method: AdaLoRA, q: dict[str, Tensor]) -> Update:
    """Return the update; PEFT saves the kept triplets alone, and s stays that of `init_r`."""
    matrices("lora_B and lora_A", (q["up"], q["down"]))
    kept = q["down"].shape[0]
    if q["gain"].shape != (kept, 1) or kept > method.init_rank:
        raise SpecError(
            f"lora_E {tuple(q['gain'].shape)} and lora_A of rank {kept} do not fit init_r {method.init_rank}"
        )
    own = method if kept == method.init_rank else replace(method, kept=kept)
    tensors = {"down": q["down"], "up": q["up"], "gain": q["gain"].flatten()}
    return Update(Site("", q["up"].shape[0], q["down"].shape[1]), own, tensors)
