"""The plain LoRA of a given rank nearest to any static update, and how far from it that is.

Of all matrices of rank r, the r leading singular triplets of dW come nearest to it, with the error
`|dW - B A|_F = sqrt(sum_(i > r) sigma_i^2)` (Eckart and Young); each group of a convolution is a matrix of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorakit.core.as_lora import plain_lora, plain_spec, refuse_moving, refuse_unknown_widths
from lorakit.core.checks import check_whole
from lorakit.core.init import by_group, leading
from lorakit.core.state import AdapterState, Update, delta_of
from lorakit.errors import SpecError, listing


@dataclass(frozen=True)
class Loss:
    """What a truncation leaves out of one update: `|dW - B A|_F`, beside `|dW|_F`."""

    error: float
    size: float

    @property
    def relative(self) -> float:
        """Return the error as a share of dW; of a dW of 0, 0 where there is no error and infinity where there is."""
        return self.error / self.size if self.size else math.inf if self.error else 0.0


def total(losses: Mapping[str, Loss]) -> float:
    """Return the relative error of all updates together, as of one long vector."""
    error, size = (math.hypot(*(getattr(x, name) for x in losses.values())) for name in ("error", "size"))
    return Loss(error, size).relative


@torch.no_grad()
def nearest_lora(
    state: AdapterState, rank: int, weights: Mapping[str, Tensor] | None = None
) -> tuple[AdapterState, dict[str, Loss]]:
    """Return the adapter with every update as the LoRA of this rank nearest to its dW, and what that leaves out.

    Args:
        state: an adapter of static updates.
        rank: of every LoRA; a weight that cannot have as high a rank gets the highest it can have, which is exact.
        weights: the base's canonical weights by key of their site, which a dW such as DoRA's depends on.

    Raises:
        SpecError: a rank below 1 or one that groups do not divide, updates with no dW, or one that needs its weight.
    """
    check_whole("rank", rank)
    refuse_moving(state)
    refuse_unknown_widths(state)
    if not state.updates:
        return state, {}
    deltas = {u.site.key: delta_of(u, (weights or {}).get(u.site.key)) for u in state.updates}
    if bare := [f"{u.site.key}: {u.method.name}" for u in state.updates if deltas[u.site.key] is None]:
        raise SpecError(f"the change of these weights depends on the weights; name the base:\n{listing(bare)}")
    updates, losses = [], {}
    for update in state.updates:
        delta = deltas.pop(update.site.key)
        assert delta is not None
        near, losses[update.site.key] = _truncated(update, delta, rank)
        updates.append(near)
    return replace(state, spec=plain_spec(state.spec, tuple(updates)), updates=tuple(updates)), losses


def _truncated(update: Update, delta: Tensor, rank: int) -> tuple[Update, Loss]:
    site = update.site
    if rank % site.groups:
        raise SpecError(f"{site.key}: rank {rank} is not a multiple of its {site.groups} groups")
    matrices = by_group(site, delta)
    own = min(rank // site.groups, *matrices.shape[1:])
    u, s, vh = leading(matrices, own)
    up, down = u * s.sqrt().unsqueeze(-2), s.sqrt().unsqueeze(-1) * vh
    error, size = torch.linalg.vector_norm(matrices - up @ down), torch.linalg.vector_norm(matrices)
    pair = {"down": down.reshape(-1, site.in_, *site.kernel).contiguous(), "up": up.flatten(0, 1).contiguous()}
    return Update(site, plain_lora(own * site.groups), pair), Loss(float(error), float(size))
