"""Adaptive LoRA's rounds: measure every update, share the rank out anew, resize the pairs whose rank changes.

A resized pair was turned into its singular coordinates, where Adam's moments mean nothing: they are forgotten, with
their step count, so that the bias correction starts anew as well. (Zero moments at a high count would make the next
steps several times too long.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lorakit.core.factored import entropy_rank, factored_values
from lorakit.core.method import Schedule, Tensors
from lorakit.core.site import Site
from lorakit.methods.allocation import allocate, resize

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "norm": lambda sigma: sigma.norm(),
    "entropy": lambda sigma: sigma.norm() * entropy_rank(sigma),
}
"""By name, a layer's score from the singular values of its update: its size, or its size times its effective rank."""


class Reallocation(Schedule):
    """Allocates after the steps in `rounds`; it remembers nothing that the gates do not say.

    The budget is the parameters of rank `mean` at every site: `mean * sum(out + in)`.
    """

    def __init__(
        self,
        adapters: Mapping[str, tuple[Site, Tensors]],
        rounds: Sequence[int],
        score: Callable[[Tensor], Tensor],
        mean: int,
        low: int,
        high: int,
    ) -> None:
        self._adapters, self._rounds, self._score = adapters, rounds, score
        self._low, self._high = low, high
        self._costs = [site.out + site.fan_in for site, _ in adapters.values()]
        self._budget = mean * sum(self._costs)

    @property
    def settled(self) -> int:
        """Return the step of the last allocation."""
        return self._rounds[-1]

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Allocate, and resize the pairs whose rank changes."""
        if step not in self._rounds:
            return
        pairs = [p for _, p in self._adapters.values()]
        scores = [float(self._score(factored_values(p["down"], p["up"] * p["gate"]))) for p in pairs]
        ranks = allocate(scores, self._budget, self._low, self._high, self._costs)
        for p, rank in zip(pairs, ranks, strict=True):
            if rank != int(p["gate"].sum()):
                resize(p["down"], p["up"], p["gate"], rank)
                for factor in (p["down"], p["up"]):
                    optimizer.state.pop(factor, None)

    def state_dict(self) -> dict[str, Tensor]:
        """Return nothing: the gates are in the adapter."""
        return {}

    def load_state_dict(self, state: Tensors) -> None:
        """Take nothing."""
