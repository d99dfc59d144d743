"""Every low-rank update as a plain LoRA: one form that every file format and every engine knows.

VeRA, block-diagonal, per-head, hierarchical and their kin train other tensors, but what they add is `up @ down`.
Written out, it is a LoRA of rank `down.shape[0]` with `s = 1` (alpha = rank), at the price of storing what they shared.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from lorakit.core.method import LowRank, Static, per_group
from lorakit.core.spec import AdapterSpec, Override, Targets, method_from_json
from lorakit.core.state import AdapterState, Update
from lorakit.errors import SpecError, listing


def as_lora(state: AdapterState) -> AdapterState:
    """Return the same adapter with every update as a LoRA of the same dW: same paths, rows, trained tensors and base.

    A product of more ranks than its weight can have is multiplied out to as many, so every rank is one LoRA takes.

    Raises:
        SpecError: updates that are no change of a weight, or no low-rank product, all of them.
    """
    refuse_moving(state)
    if misfits := [f"{u.site.key}: {u.method.name}" for u in state.updates if not isinstance(u.method, LowRank)]:
        raise SpecError(
            f"{len(misfits)} update(s) are no low-rank product, so no LoRA equals them; the nearest one of a rank you "
            f"choose is another adapter:\n{listing(misfits)}"
        )
    refuse_unknown_widths(state)
    if not state.updates:
        return state
    updates = tuple(_plain(update) for update in state.updates)
    return replace(state, spec=plain_spec(state.spec, updates), updates=updates)


def refuse_moving(state: AdapterState) -> None:
    """Raise `SpecError` for updates that depend on the input, which no LoRA equals or comes near."""
    if moving := [f"{u.site.key}: {u.method.name}" for u in state.updates if not isinstance(u.method, Static)]:
        raise SpecError(
            f"{len(moving)} update(s) are no change of a weight, so no LoRA comes near them at every input; keep "
            f"the native format, which lorakit generate reads:\n{listing(moving)}"
        )


def refuse_unknown_widths(state: AdapterState) -> None:
    """Raise `SpecError` for sites of a file that does not tell how wide its layers are."""
    if open_ := [u.site.key for u in state.updates if not u.site.in_]:
        raise SpecError(f"the file does not tell how wide these layers are; name the base:\n{listing(open_)}")


@torch.no_grad()
def _plain(update: Update) -> Update:
    assert isinstance(update.method, LowRank)
    wide = {k: t.to(torch.promote_types(t.dtype, torch.float32)) for k, t in update.tensors.items()}
    down, up = within_the_weight(*update.method.factors(wide))
    return Update(update.site, plain_lora(down.shape[0]), {"down": down.contiguous(), "up": up.contiguous()})


def within_the_weight(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pair, or, where its rank exceeds what a weight `(out, in, *kernel)` can have, its product and ones."""
    right, left = per_group(down, up)
    high, wide = left.shape[1], right.shape[2]
    if up.shape[1] <= min(high, wide):
        return down, up
    product = left @ right
    eye = torch.eye(min(high, wide), dtype=up.dtype, device=up.device).repeat(len(left), 1)
    if high <= wide:
        return product.reshape(-1, *down.shape[1:]), eye
    return eye.reshape(-1, *down.shape[1:]), product.flatten(0, 1)


def plain_spec(spec: AdapterSpec, updates: tuple[Update, ...]) -> AdapterSpec:
    """Return the spec with LoRA at the commonest rank, and an override for each other rank, at exactly its sites."""
    ranks = {update.site.key: update.tensors["down"].shape[0] for update in updates}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    other: dict[int, list[str]] = {}
    for update in updates:
        if (rank := ranks[update.site.key]) != usual:
            exact = f"re:{re.escape(update.site.path)}" if update.site.rows is None else update.site.key
            other.setdefault(rank, []).append(exact)
    overrides = [Override(Targets(at), (("alpha", float(rank)), ("rank", rank))) for rank, at in other.items()]
    return replace(spec, method=plain_lora(usual), overrides=overrides)


def plain_lora(rank: int) -> LowRank:
    """Return the LoRA of this rank with `s = 1`."""
    method = method_from_json({"name": "lora", "rank": rank, "alpha": float(rank)})
    assert isinstance(method, LowRank)
    return method
