"""What the attached methods add to the loss: keeping factors orthogonal, or experts in balance."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from lorakit.core.adapters import Adapter, attached
from lorakit.core.method import Penalised


def penalty(model: nn.Module) -> Tensor | None:
    """Return what the active adapters add to the loss of the last forward, or None where none adds anything.

    `sum over adapters of the mean over its sites of method.penalty(p, notes)`, weighted by the method's own field, in
    the dtype the tensors are kept in, whatever autocast is at work. In a training loop of one's own:

        loss = data_loss if (term := penalty(model)) is None else data_loss + term

    With gradient accumulation the terms of one optimizer step should add up to one: weigh each by its micro-batch's
    share.
    """
    terms: dict[str, list[Tensor]] = {}
    for name, adapter in attached(model, acting=True):
        if isinstance(adapter.method, Penalised):
            p = adapter.tensors()
            device = next(iter(p.values())).device
            with torch.autocast(device.type, enabled=False):
                terms.setdefault(name, []).append(adapter.method.penalty(p, adapter.notes))
            _forget_when_used(adapter)
    means = [torch.stack([t.to(of_one[0].device) for t in of_one]).mean() for of_one in terms.values()]
    return torch.stack([m.to(means[0].device) for m in means]).sum() if means else None


def _forget_when_used(adapter: Adapter) -> None:
    """Have each note forgotten once a backward has been through it: a layer that the next forward skips has none."""
    for name, note in adapter.notes.items():
        if note.requires_grad:
            note.register_hook(partial(_forget, adapter.notes, name))  # type: ignore[no-untyped-call]


def _forget(notes: dict[str, Tensor], name: str, _: Tensor) -> None:
    notes.pop(name, None)
