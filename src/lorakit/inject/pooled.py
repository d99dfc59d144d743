"""A classifier that reads its first position alone: past the attention of the last block, no other is computed.

BERT and the many models made from it pool the first position. The last block's keys and values need every position; its
output projection, its MLP and its norms are asked for one. Of six blocks that is an eighth of a step, of twelve a
sixteenth. What the model says does not change, and that is measured before it is relied on; what it returns beside its
logits is shorter.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.core.fronts import Front, base_class, put_in_front, take_from_front
from lorakit.core.hollow import is_hollow
from lorakit.core.modes import evaluating
from lorakit.core.reading import blocks_of
from lorakit.inject.statements import statements

_OUTPUT = """x = self.dense(x)
x = self.dropout(x)
x = self.LayerNorm(x + y)
return x"""
_FIRST = ("x[:, 0]", "x[:, 0, :]")


class FirstAlone(Front):
    """In front of what follows the attention of a block: it takes the first position of both its inputs."""

    outer = True
    renames = False

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Return the output at the first position, `(rows, 1, width)`."""
        narrow: Tensor = super().forward(hidden_states[:, :1], input_tensor[:, :1])  # type: ignore[misc]
        return narrow


def compute_first_alone(model: nn.Module) -> bool:
    """Make a classifier compute, past its last attention, its first position alone; return whether it does.

    It does where the code of its last block and of what reads it are known, and its logits stay as they are on a few
    tokens; on a model without values the code alone decides.
    """
    place = _after_attention(model)
    if place is None:
        return False
    if is_hollow(next(model.parameters())):
        put_in_front(place, FirstAlone)
        return True
    before = _logits(model)
    put_in_front(place, FirstAlone)
    after = _logits(model)
    eps = torch.finfo(next(model.parameters()).dtype).eps
    if before is None or after is None or not _alike(before, after, eps):
        take_from_front(place, FirstAlone)
        return False
    return True


def reads_first_alone(model: nn.Module) -> bool:
    """Return whether the code of a model says that it is a classifier that reads its first position alone."""
    return _after_attention(model) is not None


def _after_attention(model: nn.Module) -> nn.Module | None:
    """Return what follows the attention of the last block, or None in a model that reads more than a first position."""
    blocks = blocks_of(model)
    if not type(model).__name__.endswith("ForSequenceClassification") or not blocks:
        return None
    readers = [module for name, module in model.named_modules() if name.rpartition(".")[2] in ("pooler", "classifier")]
    codes = [statements(base_class(module).forward, "x") for module in readers]
    if not any(part in code for part in _FIRST for code in codes):
        return None
    found = getattr(getattr(blocks[-1], "attention", None), "output", None)
    known = isinstance(found, nn.Module) and statements(base_class(found).forward, "x", "y") == _OUTPUT
    return found if known else None


def _logits(model: nn.Module) -> Tensor | None:
    """Return the logits of two rows of a few tokens, one of them padded; None where the model does not take them."""
    one = next(model.parameters())
    config: Any = model.config
    ids = torch.arange(14, device=one.device).view(2, 7) % config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    try:
        with evaluating(model), torch.no_grad():
            return cast(Tensor, model(input_ids=ids, attention_mask=mask).logits).float()
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None


def _alike(one: Tensor, other: Tensor, eps: float) -> bool:
    """Return whether logits differ by no more than half the digits of their dtype: far more than rounding leaves."""
    same = one.shape == other.shape
    return same and float((one - other).abs().max()) <= math.sqrt(eps) * (1 + float(one.abs().max()))
