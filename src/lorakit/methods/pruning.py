"""AdaLoRA's budget at work: which triplets are spent on, step by step (arXiv 2303.10512, section 3.2 and 3.3).

The importance of a weight is I = |w dL/dw|, smoothed: I' = b1 I' + (1 - b1) I, with the uncertainty
U' = b2 U' + (1 - b2) |I - I'|; its score is I' U'. A triplet scores s(lambda_i) + mean_j s(P_ji) + mean_j s(Q_ij). The
budget falls from all triplets to the target by a cubic, as in the authors' code: the paper's eq. 14 prints a numerator
that starts above the first budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lorakit.core.method import Schedule, Tensors
from lorakit.core.site import Site


@dataclass(frozen=True)
class Budget:
    """How many triplets may act after each step: `first` up to `tinit`, `last` from `end` on, a cubic in between."""

    first: int
    last: int
    tinit: int
    end: int
    delta_t: int

    def at(self, step: int) -> tuple[int, bool]:
        """Return `(budget, whether triplets are pruned to it now)` after step `step`, counted from 1."""
        if step <= self.tinit:
            return self.first, False
        if step >= self.end:
            return self.last, True
        left = 1 - (step - self.tinit) / (self.end - self.tinit)
        return int((self.first - self.last) * left**3 + self.last), step % self.delta_t == 0


class Pruning(Schedule):
    """Sets the gains of the least important triplets of all sites to 0; until `end` a pruned one may come back."""

    def __init__(
        self, adapters: Mapping[str, tuple[Site, Tensors]], budget: Budget, beta1: float, beta2: float
    ) -> None:
        self._adapters, self._budget, self._betas = adapters, budget, (beta1, beta2)
        self._sensitivity: dict[str, Tensor] = {}
        self._uncertainty: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}

    @property
    def settled(self) -> int:
        """Return the step of the final choice."""
        return self._budget.end

    @torch.no_grad()
    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Take the step's gradients into account and prune: the weights are the updated ones, as in the authors' code.

        After `end` the choice stands, and what the optimizer gave to pruned gains is taken back after every step.
        """
        if step < self._budget.end:
            self._observe()
        budget, prunes = self._budget.at(step)
        if not prunes:
            return
        kept = self._kept or self._best(budget)
        if step >= self._budget.end:
            self._kept, self._sensitivity, self._uncertainty = kept, {}, {}
        for key, (_, p) in self._adapters.items():
            p["gain"].masked_fill_(~kept[key], 0.0)

    def state_dict(self) -> dict[str, Tensor]:
        """Return importance and uncertainty of every weight, and the final choice once it is made."""
        parts = {"sensitivity": self._sensitivity, "uncertainty": self._uncertainty, "kept": self._kept}
        return {f"{key}/{part}": value for part, values in parts.items() for key, value in values.items()}

    def load_state_dict(self, state: Tensors) -> None:
        """Take what `state_dict` returned."""
        parts: dict[str, dict[str, Tensor]] = {"sensitivity": {}, "uncertainty": {}, "kept": {}}
        for name, value in state.items():
            key, _, part = name.rpartition("/")
            site = key if part == "kept" else key.rpartition(".")[0]
            parts[part][key] = value.to(self._adapters[site][1]["gain"].device)
        self._sensitivity, self._uncertainty, self._kept = parts.values()

    def _observe(self) -> None:
        """Smooth the importance of every weight that got a gradient; others keep theirs."""
        beta1, beta2 = self._betas
        for key, (_, p) in self._adapters.items():
            for name, w in p.items():
                if w.grad is not None:
                    at, now = f"{key}.{name}", (w * w.grad).abs()
                    mean = beta1 * self._sensitivity.get(at, torch.zeros_like(w)) + (1 - beta1) * now
                    before = self._uncertainty.get(at, torch.zeros_like(w))
                    self._uncertainty[at] = beta2 * before + (1 - beta2) * (now - mean).abs()
                    self._sensitivity[at] = mean

    def _best(self, budget: int) -> dict[str, Tensor]:
        """Return the masks of the `budget` triplets with the highest scores; of equal ones the first, so that the
        budget is met exactly."""
        scores = {key: self._scores(key, site, p) for key, (site, p) in self._adapters.items()}
        device = next(iter(scores.values())).device
        every = torch.cat([s.to(device) for s in scores.values()])
        kept = torch.zeros_like(every, dtype=torch.bool)
        kept[every.argsort(descending=True, stable=True)[:budget]] = True
        ends = dict(zip(scores, accumulate(len(s) for s in scores.values()), strict=True))
        return {key: kept[ends[key] - len(s) : ends[key]].to(s.device) for key, s in scores.items()}

    def _scores(self, key: str, site: Site, p: Tensors) -> Tensor:
        """Return the score of each triplet of one site."""
        s = {}
        for name, w in p.items():
            at = f"{key}.{name}"
            seen = at in self._sensitivity
            s[name] = self._sensitivity[at] * self._uncertainty[at] if seen else torch.zeros_like(w)
        per_group = s["up"].reshape(site.groups, -1, s["up"].shape[1]).mean(1)
        return s["gain"] + (s["down"].flatten(1).mean(1) + per_group.flatten())
