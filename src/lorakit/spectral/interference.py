"""What two updates of one weight do to each other when both are active: a forecast before they are combined.

    alignment    cos(dW_a, dW_b) = <dW_a, dW_b>_F / (|dW_a|_F |dW_b|_F)
    disturbance  |dW_b V_a|_F / |dW_a|_F     V_a: the inputs that dW_a reads, an orthonormal basis

On an input that only dW_a reads, b adds `disturbance` times what a itself says: 0 leaves a alone, 1 is as loud as a.
Updates that know nothing of each other disturb by `|dW_b|_F / |dW_a|_F sqrt(r_a / n)`. An alignment above 0 says that
they repeat each other, one below 0 that they cancel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import SpecError
from lorakit.spectral.subspace import similarity
from lorakit.spectral.svd import Svd

ALIGNED, LOUD = 0.3, 0.5
"""The alignment, of either sign, from which updates repeat or cancel each other; the disturbance that drowns one."""


@dataclass(frozen=True)
class Interference:
    """Two updates of one weight. `inputs` and `outputs` are how alike the subspaces are that they read and write.

    `disturbed` is what the second adds where the first reads, over what the first says, and `disturbs` the other way
    round; `chance` is what `disturbed` is on the average over random directions, `inputs_by_chance` the same of
    `inputs`.
    """

    alignment: float
    inputs: float
    outputs: float
    inputs_by_chance: float
    disturbed: float
    disturbs: float
    chance: float

    @property
    def forecast(self) -> str:
        """Return it in one word: "repeat", "cancel", "apart", or who drowns whom.

        "disturb" each other, "disturbs": the first drowns the second, "disturbed": the second the first.
        """
        if abs(self.alignment) >= ALIGNED:
            return "repeat" if self.alignment > 0 else "cancel"
        if self.disturbed >= LOUD:
            return "disturb" if self.disturbs >= LOUD else "disturbed"
        return "disturbs" if self.disturbs >= LOUD else "apart"

    def to_json(self) -> dict[str, Any]:
        """Return the fields and the forecast as plain values."""
        return {**self.__dict__, "forecast": self.forecast}


@torch.no_grad()
def interference(first: Svd, second: Svd) -> Interference:
    """Return what two updates of one weight do to each other, from their triplets.

    Raises:
        SpecError: an update of 0, updates of weights of different shapes.
    """
    shapes = [(one.u.shape[0], one.vh.shape[1]) for one in (first, second)]
    if shapes[0] != shapes[1]:
        raise SpecError(f"updates of weights {shapes[0]} and {shapes[1]} do not meet; compare updates of one weight")
    a, b = (_acting(one) for one in (first, second))
    if not (len(a.s) and len(b.s)):
        raise SpecError("one of the updates is 0, so it meets nothing; leave out what is_dead")
    read, written = a.vh @ b.vh.T, a.u.T @ b.u
    size = float(a.s.norm()), float(b.s.norm())
    n, ranks = shapes[0][1], (len(a.s), len(b.s))
    return Interference(
        alignment=float((a.s[:, None] * written * read * b.s).sum()) / (size[0] * size[1]),
        inputs=similarity(a.vh, b.vh, *ranks),
        outputs=similarity(a.u.T, b.u.T, *ranks),
        inputs_by_chance=max(ranks) / n,
        disturbed=float((read * b.s).norm()) / size[0],
        disturbs=float((read.T * a.s).norm()) / size[1],
        chance=size[1] / size[0] * math.sqrt(ranks[0] / n),
    )


def _acting(one: Svd) -> Svd:
    """Return the triplets that are not 0 to rounding, in fp64 on the CPU."""

    def wide(t: Tensor) -> Tensor:
        return t.detach().cpu().double()

    rank = one.rank
    return Svd(wide(one.u[:, :rank]), wide(one.s[:rank]), wide(one.vh[:rank]))
