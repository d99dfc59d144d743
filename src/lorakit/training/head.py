"""How a language model's logits come from what its head reads: measured once, so that the loss can do without them.

A family's class may cap its logits, scale them, or make them some other way, and its name tells nothing of that. Two
tokens go through the model; where its logits are its head's product with what the head was given, tempered as the
configuration says, the loss takes what the head was given. Wherever not, the reason is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.adapters import Adapted
from lorakit.core.fronts import is_watched
from lorakit.core.hollow import is_hollow
from lorakit.core.modes import evaluating
from lorakit.inject.context import telling_ends
from lorakit.kernels.linear_cross_entropy import Temper

ATTRIBUTE = "_lorakit_temper"
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""What configurations call a scale of the logits; some families multiply by it and some divide."""
TALL = 64.0
"""The largest logit of the measurement: a cap of common size bends it, and fp16 holds it."""


@dataclass(frozen=True)
class Head:
    """The layer that makes a model's logits, and what the model does to its output."""

    layer: nn.Linear
    temper: Temper


def head_of(model: Any) -> Head | str:
    """Return a model's head, or why its loss needs the logits whole.

    The measurement draws no random number; it is kept on the model, so only the first call runs it. A rehearsed model
    has no values to measure, and is taken by its configuration: a scale changes neither memory nor work.
    """
    layer = getattr(model, "get_output_embeddings", lambda: None)()
    if layer is None:
        return "the model has no head over a vocabulary"
    if isinstance(layer, Adapted):
        return "its head is adapted"
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward or "forward" in vars(layer):
        return f"its head is no plain linear layer, but a {type(layer).__name__}"
    if is_watched(layer):
        return "something watches its head"
    if is_hollow(layer.weight):
        return Head(layer, Temper(cap=_cap(model)))
    if type(layer.weight.data) is not Tensor:
        return f"its head's weight is a {type(layer.weight.data).__name__}"
    if not hasattr(model, ATTRIBUTE):
        setattr(model, ATTRIBUTE, _measured(model, layer))
    temper: Temper | None = getattr(model, ATTRIBUTE)
    return "its logits are not what its head makes" if temper is None else Head(layer, temper)


@contextmanager
def given_to(layer: nn.Linear) -> Iterator[list[Tensor]]:
    """Keep what a head is given, `(batch, length, d)` in the dtype of its product, and give it no row of that.

    So it makes no logits, and all else of the model runs as ever: what is in front of it, autocast, a wrapper around.
    """
    given: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, device = args[0], args[0].device.type
        narrow = torch.is_autocast_enabled(device)
        given.append(hidden.to(torch.get_autocast_dtype(device)) if narrow else hidden)
        return hidden.new_empty(len(hidden), 0, hidden.shape[-1]), *args[1:]

    hook = layer.register_forward_pre_hook(keep)
    try:
        yield given
    finally:
        hook.remove()


@torch.no_grad()
def _measured(model: Any, layer: nn.Linear) -> Temper | None:
    """Return what becomes of the head's output on two tokens, stretched to tall logits; None for nothing known."""
    seen: list[Tensor] = []

    def stretch(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tallest = F.linear(args[0], layer.weight, layer.bias).abs().amax()
        seen.append(args[0] * (TALL / tallest))
        return seen[-1], *args[1:]

    ids = torch.arange(2, device=layer.weight.device)[None]
    hook = layer.register_forward_pre_hook(stretch)
    try:
        with evaluating(model), telling_ends(model, torch.tensor([2])):
            logits: Tensor = model(input_ids=ids).logits
    finally:
        hook.remove()
    if len(seen) != 1 or seen[0].shape[:-1] != ids.shape:
        return None
    made = F.linear(seen[0], layer.weight, layer.bias)
    return next((temper for temper in _known(model) if alike(temper.plain(made), logits)), None)


def _known(model: Any) -> Iterator[Temper]:
    """Yield what may become of the head's output, by the words of the configuration."""
    config, cap = model.config.get_text_config(), _cap(model)
    told = [float(scale) for name in SCALES if (scale := getattr(config, name, None))]
    for scale in (1.0, *told, *(1 / scale for scale in told)):
        yield Temper(scale, cap)


def _cap(model: Any) -> float | None:
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return float(cap) if cap else None


def alike(made: Tensor, known: Tensor) -> bool:
    """Return whether two ways to a tensor agree, to four roundings of its largest number in the coarser dtype."""
    if made.shape != known.shape:
        return False
    allowed = 4 * max(torch.finfo(t.dtype).eps for t in (made, known)) * float(known.abs().max())
    return float((made.float() - known.float()).abs().max()) <= allowed
