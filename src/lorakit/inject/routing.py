"""What the routers of a mixture did in the last forward: whom the tokens went to, and how decided the choice was.

A mixture can fail quietly: its loss falls while a few experts do all the work. Every method that notes `share` and
`entropy` of a forward (`Call.notes`) is in the table.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lorakit.core.adapters import attached
from lorakit.errors import AliveError


@dataclass(frozen=True)
class Routing:
    """One row: the experts of one adapter at one site.

    `share` is each expert's part of the tokens (of their weight, where all experts act), adding up to 1. `entropy` is
    that of a token's likelihood over the experts, averaged, in nats: 0 when every token is sure, ln E when none is.
    """

    adapter: str
    site: str
    share: tuple[float, ...]
    entropy: float


def routing(model: nn.Module) -> list[Routing]:
    """Return a row for every site with experts, in the model's order, of the last forward it took part in.

    Raises:
        AliveError: nothing was routed: no mixture is attached, or the model has not run since.
    """
    rows = [
        Routing(name, adapter.site.key, tuple(adapter.notes["share"].tolist()), float(adapter.notes["entropy"]))
        for name, adapter in attached(model)
        if {"share", "entropy"} <= adapter.notes.keys()
    ]
    if not rows:
        raise AliveError("no token was routed on this model; attach a mixture and run a forward first")
    return rows
